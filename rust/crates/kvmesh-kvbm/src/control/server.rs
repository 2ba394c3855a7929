//! The store's end: one thread a connection.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufReader, IoSlice, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvmesh_core::Digest;
use parking_lot::Mutex;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg, shutdown,
};

use super::wire::{FULL, PRESENT, Request, Response, VERSION, read_frame};
use crate::arena::Arena;
use crate::block::{Lease, Reservation, Reserved, register, reserve};
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::store::Store;
use crate::tiers::{NamespaceId, Tier};

/// Longest path of a unix socket on Linux, without the final zero.
const MAX_SOCKET_PATH: usize = 107;

/// Serves a store to the engines of its node.
pub struct StoreServer {
    store: Arc<Store>,
    path: PathBuf,
    listener: UnixListener,
    shared: Arc<Shared>,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, (UnixStream, Option<u64>)>,
    threads: Vec<JoinHandle<()>>,
}

impl StoreServer {
    /// Listens on `path`, for this user only. A socket file a killed store left there is replaced.
    pub fn start(path: &Path, store: Arc<Store>) -> Result<Self> {
        let listener = listen(path)?;
        let shared = Arc::new(Shared::default());
        let accepting = {
            let listener = listener
                .try_clone()
                .map_err(Error::io("cannot listen on", path))?;
            let (shared, store) = (shared.clone(), store.clone());
            spawn("kvbm-accept", move || accept(&listener, &shared, &store))
                .map_err(Error::io("cannot listen on", path))?
        };
        Ok(Self {
            store,
            path: path.to_owned(),
            listener,
            shared,
            accepting: Mutex::new(Some(accepting)),
        })
    }

    /// The store served.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Engines connected now.
    pub fn engines(&self) -> usize {
        let connections = self.shared.connections.lock();
        connections
            .open
            .values()
            .filter_map(|(_, engine)| *engine)
            .collect::<HashSet<u64>>()
            .len()
    }

    /// Disconnects all engines, stops listening and lets go of the disk. Idempotent.
    pub fn stop(&self) {
        let Some(accepting) = self.accepting.lock().take() else {
            return;
        };
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes `accept`. It can fail only if the socket is closed already, which is what is wanted.
        let _ = shutdown(&self.listener, Shutdown::Both);
        let _ = accepting.join();
        let _ = fs::remove_file(&self.path);
        let threads = {
            let mut connections = self.shared.connections.lock();
            for (stream, _) in connections.open.values() {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
            std::mem::take(&mut connections.threads)
        };
        for thread in threads {
            let _ = thread.join();
        }
        self.store.stop();
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(path: &Path) -> Result<UnixListener> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::SocketPathTooLong {
            path: path.to_owned(),
            max: MAX_SOCKET_PATH,
        });
    }
    let failed = || Error::io("cannot listen on", path);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed())?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(Error::SocketTaken(path.to_owned()));
            }
            fs::remove_file(path).map_err(failed())?;
            UnixListener::bind(path)
        }
        other => other,
    };
    let listener = listener.map_err(failed())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed())?;
    Ok(listener)
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, store: &Arc<Store>) {
    while !shared.stopping.load(Ordering::SeqCst) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // Out of descriptors or memory, say; engines try again by themselves.
            Err(_) => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        let Ok(registered) = stream.try_clone() else {
            continue;
        };
        let mut connections = shared.connections.lock();
        connections.next += 1;
        let id = connections.next;
        connections.open.insert(id, (registered, None));
        connections.threads.retain(|thread| !thread.is_finished());
        let (of_thread, store) = (shared.clone(), store.clone());
        let thread = spawn("kvbm-engine", move || {
            // The engine hears of a failure by the end of its connection, and connects again.
            let _ = serve(&stream, &of_thread, id, &store);
            of_thread.connections.lock().open.remove(&id);
        });
        match thread {
            Ok(thread) => connections.threads.push(thread),
            Err(_) => drop(connections.open.remove(&id)),
        }
    }
}

fn serve(stream: &UnixStream, shared: &Shared, id: u64, store: &Arc<Store>) -> Result<()> {
    let mut reader = BufReader::with_capacity(64 << 10, stream);
    let mut frame = Vec::new();
    let lost = |error: io::Error| Error::Disconnected(error.to_string());
    if !read_frame(&mut reader, &mut frame).map_err(lost)? {
        return Ok(());
    }
    let opened = match Request::decode(&frame)? {
        Request::Hello { engine, namespace } => {
            Session::open(store, &namespace).map(|session| (engine, session))
        }
        Request::Other { version } => Err(Error::Refused(format!(
            "the engine speaks version {version}, this store {VERSION}; run the same release of both"
        ))),
        _ => return Err(Error::Protocol("a connection begins without a greeting")),
    };
    let (engine, mut session) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let refused = Response::Refused {
                reason: error.to_string(),
            };
            return (&mut &*stream).write_all(&refused.encode()).map_err(lost);
        }
    };
    if let Some((_, slot)) = shared.connections.lock().open.get_mut(&id) {
        *slot = Some(engine);
    }
    welcome(stream, store.host().arena()).map_err(lost)?;
    while read_frame(&mut reader, &mut frame).map_err(lost)? {
        let response = session.handle(Request::decode(&frame)?)?;
        (&mut &*stream)
            .write_all(&response.encode())
            .map_err(lost)?;
    }
    Ok(())
}

/// Answers the greeting, with the arena's descriptor attached.
fn welcome(stream: &UnixStream, arena: &Arena) -> io::Result<()> {
    let frame = Response::Welcome { version: VERSION }.encode();
    let descriptors = [arena.descriptor()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(
        stream.as_fd(),
        &[IoSlice::new(&frame)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    (&mut &*stream).write_all(&frame[sent..])
}

/// What one connection holds; dropping it releases everything.
struct Session {
    store: Arc<Store>,
    host: Arc<dyn Tier>,
    namespace: NamespaceId,
    reserved: HashMap<u64, Reserved>,
    /// Each with when it began.
    leases: HashMap<u64, (Lease, Instant)>,
    next_lease: u64,
}

impl Session {
    fn open(store: &Arc<Store>, namespace: &Namespace) -> Result<Self> {
        let namespace = store.open(namespace)?;
        Ok(Self {
            store: store.clone(),
            host: store.host().clone(),
            namespace,
            reserved: HashMap::new(),
            leases: HashMap::new(),
            next_lease: 0,
        })
    }

    fn handle(&mut self, request: Request) -> Result<Response> {
        Ok(match request {
            Request::Hello { .. } | Request::Other { .. } => {
                return Err(Error::Protocol("a second greeting"));
            }
            Request::Lookup {
                per_block_us,
                chain,
            } => {
                let per_block = Duration::from_micros(u64::from(per_block_us));
                let found = self.store.lookup_for(self.namespace, &chain, per_block);
                Response::Found {
                    blocks: found.blocks as u32,
                    coming: found.coming,
                }
            }
            Request::Reserve {
                tenant,
                parent,
                chain,
            } => {
                self.store.expire_pins();
                self.store.claim(self.namespace, &chain, &tenant);
                let reservations = reserve(&self.host, self.namespace, parent.as_ref(), &chain);
                let slots = reservations
                    .into_iter()
                    .map(|reservation| match reservation {
                        Reservation::Room(reserved) => {
                            let offset = reserved.slot().0;
                            self.reserved.insert(offset, reserved);
                            offset
                        }
                        Reservation::Present => PRESENT,
                        Reservation::Full => FULL,
                    });
                Response::Rooms {
                    slots: slots.collect(),
                }
            }
            Request::Register { slots } => {
                let filled: Vec<_> = (slots.iter())
                    .filter_map(|slot| self.reserved.remove(slot)?.seal().ok())
                    .collect();
                self.reserved.clear();
                let blocks = filled.len() as u32;
                register(filled);
                self.store.stored();
                Response::Registered { blocks }
            }
            Request::Lease { chain } => {
                let (leased, coming) = self.store.lease(self.namespace, &chain);
                let origins = self.store.host().take_origins(leased.slots());
                let slots: Vec<u64> = leased.slots().iter().map(|slot| slot.0).collect();
                self.next_lease += 1;
                if !slots.is_empty() {
                    self.leases
                        .insert(self.next_lease, (leased, Instant::now()));
                }
                Response::Leased {
                    lease: self.next_lease,
                    slots,
                    coming,
                    origins,
                }
            }
            Request::Hint { blocks, hints } => {
                let hashes: Vec<_> = blocks.iter().map(Digest::block_hash).collect();
                self.store.hint(self.namespace, &hashes, hints);
                Response::Hinted
            }
            Request::Release { lease, corrupt } => {
                if let Some((leased, begun)) = self.leases.remove(&lease) {
                    let there = |index: &usize| *index < leased.slots().len();
                    for index in corrupt
                        .into_iter()
                        .map(|index| index as usize)
                        .filter(there)
                    {
                        leased.discard(index);
                        self.store.suspect(self.namespace, leased.digest(index));
                    }
                    self.store.loaded_in(begun.elapsed());
                }
                Response::Released
            }
        })
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.into()).spawn(body)
}
