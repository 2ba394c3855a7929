//! An engine's end.

use std::io::{self, BufReader, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvmesh_core::Digest;
use parking_lot::Mutex;
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

use super::lease::ClientLease;
use super::wire::{FULL, PRESENT, Request, Response, VERSION, read_frame};
use crate::arena::Arena;
use crate::copy::Pages;
use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::image::Layout;
use crate::namespace::Namespace;
use crate::slot;
use crate::store::Found;

/// Slots reserved at a time: few enough that an engine which dies or stalls holds little.
const RESERVED_AT_ONCE: usize = 64;
/// The least time a block on its way from a lower tier is waited for.
const ARRIVAL: Duration = Duration::from_secs(10);
/// The least time a store has to greet: it maps an arena, and nobody's request waits for it.
const GREETING: Duration = Duration::from_secs(2);

/// A way to the store of this node. Calls may come from any thread and wait for each other.
///
/// A call that fails with `Disconnected` ends the connection; `connect` makes a new one, to the same store or to the one
/// that took its place.
pub struct StoreClient {
    path: PathBuf,
    namespace: Namespace,
    layout: Arc<Layout>,
    engine: u64,
    timeout: Duration,
    connection: Mutex<Option<Arc<Connection>>>,
}

/// What became of blocks handed over for offloading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloaded {
    /// Copied and registered.
    pub stored: usize,
    /// The store had them already.
    pub present: usize,
    /// There was no room for them.
    pub full: usize,
}

pub(super) struct Connection {
    socket: Mutex<BufReader<UnixStream>>,
    pub(super) arena: Arena,
    broken: AtomicBool,
}

impl StoreClient {
    /// A client of the store at `path`, not connected yet. `engine` is the same for all clients of one process, and
    /// no other; `timeout` bounds every answer's wait, but for the greeting's.
    pub fn new(path: &Path, namespace: Namespace, engine: u64, timeout: Duration) -> Self {
        let layout = Arc::new(Layout::new(&namespace));
        Self {
            path: path.to_owned(),
            namespace,
            layout,
            engine,
            timeout,
            connection: Mutex::new(None),
        }
    }

    /// Connects unless connected. Fails with `Refused` where the store cannot serve such blocks.
    pub fn connect(&self) -> Result<()> {
        if self.connected().is_err() {
            // Not under the lock: other calls are to fail at once meanwhile, not to wait for a store that is not there.
            let opened = Connection::open(&self.path, &self.namespace, self.engine, self.timeout)?;
            *self.connection.lock() = Some(Arc::new(opened));
        }
        Ok(())
    }

    /// Whether there is a connection and the store has not closed it. Notices a dead store without a request.
    pub fn is_connected(&self) -> bool {
        let mut connection = self.connection.lock();
        let connected = connection
            .as_ref()
            .is_some_and(|connection| connection.is_alive());
        if !connected {
            *connection = None;
        }
        connected
    }

    /// Ends the connection once the last lease is dropped.
    pub fn close(&self) {
        *self.connection.lock() = None;
    }

    /// How many leading blocks of the chain the store has. Those in a lower tier begin to come up.
    pub fn lookup(&self, chain: &[Digest]) -> Result<usize> {
        Ok(self.lookup_for(chain, Duration::ZERO)?.blocks)
    }

    /// The same for an engine that computes a block in so much time: what can be had sooner from elsewhere begins to come
    /// to the store.
    pub fn lookup_for(&self, chain: &[Digest], per_block: Duration) -> Result<Found> {
        let per_block_us = u32::try_from(per_block.as_micros()).unwrap_or(u32::MAX);
        match self
            .connected()?
            .call(&Request::lookup(chain, per_block_us))?
        {
            Response::Found { blocks, coming } => Ok(Found {
                blocks: (blocks as usize).min(chain.len()),
                coming,
            }),
            _ => Err(Error::Protocol("not an answer to a look-up")),
        }
    }

    /// Copies a chain of blocks out of `pages`, whose `ids` are in chain order; `parent` is the block before the first,
    /// unless the first begins a prompt. Stops at the first block there is no room for.
    pub fn offload(
        &self,
        parent: Option<&Digest>,
        chain: &[Digest],
        pages: &Pages,
        ids: &[u32],
    ) -> Result<Offloaded> {
        self.offload_for("", parent, chain, pages, ids)
    }

    /// The same of blocks of a tenant, whose share of the store they count to.
    pub fn offload_for(
        &self,
        tenant: &str,
        parent: Option<&Digest>,
        chain: &[Digest],
        pages: &Pages,
        ids: &[u32],
    ) -> Result<Offloaded> {
        self.check(chain, pages, ids)?;
        let connection = self.connected()?;
        let mut parent = parent.copied();
        let mut offloaded = Offloaded::default();
        for (chain, ids) in chain
            .chunks(RESERVED_AT_ONCE)
            .zip(ids.chunks(RESERVED_AT_ONCE))
        {
            let Response::Rooms { slots } =
                connection.call(&Request::reserve(tenant, parent.as_ref(), chain))?
            else {
                return Err(Error::Protocol("not an answer to a reservation"));
            };
            let mut filled = Vec::with_capacity(slots.len());
            for ((&slot, digest), &id) in slots.iter().zip(chain).zip(ids) {
                match slot {
                    PRESENT => offloaded.present += 1,
                    FULL => offloaded.full += 1,
                    slot => {
                        self.fill(&connection.arena, slot, digest, pages, id)?;
                        filled.push(slot);
                    }
                }
            }
            if !filled.is_empty() {
                let Response::Registered { blocks } =
                    connection.call(&Request::register(&filled))?
                else {
                    return Err(Error::Protocol("not an answer to a registration"));
                };
                offloaded.stored += blocks as usize;
            }
            if offloaded.full > 0 {
                break;
            }
            parent = chain.last().copied();
        }
        Ok(offloaded)
    }

    /// Tells the store what requests that use these blocks from now on say of their return.
    pub fn hint(&self, blocks: &[Digest], hints: &Hints) -> Result<()> {
        match self.connected()?.call(&Request::hint(blocks, hints))? {
            Response::Hinted => Ok(()),
            _ => Err(Error::Protocol("not an answer to a hint")),
        }
    }

    /// Leases the whole chain, or nothing.
    pub fn lease(&self, chain: &[Digest]) -> Result<Option<ClientLease>> {
        let connection = self.connected()?;
        let Response::Leased {
            lease,
            slots,
            coming,
            origins,
        } = connection.call(&Request::lease(chain))?
        else {
            return Err(Error::Protocol("not an answer to a lease"));
        };
        let slot_bytes = self.layout.slot_bytes();
        if slots.len() > chain.len()
            || !slots
                .iter()
                .all(|&slot| connection.arena.contains(slot, slot_bytes))
        {
            return Err(Error::Protocol("a slot outside the arena"));
        }
        let whole = slots.len() == chain.len() && !slots.is_empty();
        // Where it is not whole, dropping it releases the part.
        let leased = ClientLease {
            connection,
            layout: self.layout.clone(),
            id: (!slots.is_empty()).then_some(lease),
            chain: chain[..slots.len()].to_vec(),
            slots,
            coming,
            origins,
            patience: self.timeout.max(ARRIVAL),
            checksums: Vec::new(),
            corrupt: Vec::new(),
        };
        Ok(whole.then_some(leased))
    }

    fn connected(&self) -> Result<Arc<Connection>> {
        let mut connection = self.connection.lock();
        if connection
            .as_ref()
            .is_some_and(|connection| connection.is_broken())
        {
            *connection = None;
        }
        connection
            .clone()
            .ok_or_else(|| Error::Disconnected("not connected".into()))
    }

    fn check(&self, chain: &[Digest], pages: &Pages, ids: &[u32]) -> Result<()> {
        if chain.len() != ids.len() {
            return Err(Error::Invalid("one page id a block is needed".into()));
        }
        pages
            .check(self.layout.segments(), ids)
            .map_err(|error| Error::Invalid(error.to_string()))
    }

    fn fill(
        &self,
        arena: &Arena,
        slot: u64,
        digest: &Digest,
        pages: &Pages,
        id: u32,
    ) -> Result<()> {
        if !arena.contains(slot, self.layout.slot_bytes()) {
            return Err(Error::Protocol("a slot outside the arena"));
        }
        slot::fill(arena, slot, &self.layout, digest, |number, at| {
            let target = arena.at(at, self.layout.segments()[number].bytes);
            // SAFETY: `at` checked the bounds, and the store gave this slot to this connection alone. The pages
            // are those `Pages::new`'s caller vouches for.
            unsafe { pages.copy_to(id, number, target) }
        });
        Ok(())
    }
}

impl Connection {
    fn open(path: &Path, namespace: &Namespace, engine: u64, timeout: Duration) -> Result<Self> {
        let lost = |error: io::Error| Error::Disconnected(format!("{}: {error}", path.display()));
        let stream = UnixStream::connect(path).map_err(lost)?;
        let greeting = timeout.max(GREETING);
        stream.set_read_timeout(Some(greeting)).map_err(lost)?;
        stream.set_write_timeout(Some(greeting)).map_err(lost)?;
        (&stream)
            .write_all(&Request::hello(engine, namespace))
            .map_err(lost)?;
        let (first, descriptor) = receive_with_descriptor(&stream).map_err(lost)?;
        let mut frame = Vec::new();
        if !read_frame(&mut io::Read::chain(&first[..], &stream), &mut frame).map_err(lost)? {
            return Err(Error::Disconnected(
                "the store closed the connection".into(),
            ));
        }
        stream.set_read_timeout(Some(timeout)).map_err(lost)?;
        stream.set_write_timeout(Some(timeout)).map_err(lost)?;
        match (Response::decode(&frame)?, descriptor) {
            (Response::Welcome { version: VERSION }, Some(descriptor)) => Ok(Self {
                socket: Mutex::new(BufReader::with_capacity(64 << 10, stream)),
                arena: Arena::open(descriptor)
                    .map_err(Error::io("cannot map the arena of", path))?,
                broken: AtomicBool::new(false),
            }),
            (Response::Refused { reason }, _) => Err(Error::Refused(reason)),
            _ => Err(Error::Protocol("not an answer to a greeting")),
        }
    }

    pub(super) fn call(&self, request: &[u8]) -> Result<Response> {
        let mut socket = self.socket.lock();
        if self.is_broken() {
            return Err(Error::Disconnected("the connection has failed".into()));
        }
        let mut frame = Vec::new();
        let exchanged = (|| {
            socket.get_mut().write_all(request)?;
            read_frame(&mut *socket, &mut frame)
        })();
        let failure = match exchanged {
            Ok(true) => match Response::decode(&frame) {
                Ok(response) => return Ok(response),
                Err(error) => error,
            },
            Ok(false) => Error::Disconnected("the store closed the connection".into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Error::Disconnected("the store did not answer in time".into())
            }
            Err(error) => Error::Disconnected(error.to_string()),
        };
        // An answer that still comes would be taken for the next request's.
        self.broken.store(true, Ordering::SeqCst);
        Err(failure)
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Looks whether the store hung up. While a call is under way, that call finds out.
    pub(super) fn is_alive(&self) -> bool {
        if let Some(socket) = self.socket.try_lock() {
            let mut byte = [MaybeUninit::<u8>::uninit(); 1];
            let peeked = recv(
                socket.get_ref(),
                &mut byte,
                RecvFlags::PEEK | RecvFlags::DONTWAIT,
            );
            if !matches!(peeked, Err(rustix::io::Errno::AGAIN)) {
                // Ended, failed, or an answer nobody asked for.
                self.broken.store(true, Ordering::SeqCst);
            }
        }
        !self.is_broken()
    }
}

/// Receives what has come so far, and the descriptor attached to it.
fn receive_with_descriptor(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        recvmsg(
            stream.as_fd(),
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    bytes.truncate(received.bytes);
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((bytes, descriptor))
}
