//! A store within one process: blocks of one size, put and got one by one.

use std::sync::Arc;
use std::time::Duration;

use kvmesh_core::{Digest, Tier as Kind};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::block::{self, Lease, Reservation};
use crate::error::{Error, Result};
use crate::namespace::Namespace;
use crate::store::{Settings, Store};
use crate::tiers::{NamespaceId, Tier};

/// A writer waits so long for others to leave, then they leave unwritten.
const PATIENCE: Duration = Duration::from_secs(10);
/// Tries to read a block, whose copy in one tier may turn out to be bad.
const TRIES: usize = 3;

/// Blocks of `block_bytes` by digest. Thread-safe.
pub struct BlockStore {
    store: Store,
    namespace: NamespaceId,
    block_bytes: usize,
    pinned: Mutex<FxHashMap<Digest, Vec<Lease>>>,
}

impl BlockStore {
    /// Makes the tiers.
    pub fn new(settings: &Settings, block_bytes: u32) -> Result<Self> {
        if block_bytes == 0 {
            return Err(Error::Invalid("a block has at least one byte".into()));
        }
        let store = Store::new(settings)?;
        let name = Namespace {
            model: String::new(),
            revision: String::new(),
            dtype: "bytes".into(),
            layout: "whole".into(),
            rank: 0,
            ranks: 1,
            segments: vec![block_bytes],
        };
        let namespace = store.open(&name)?;
        if let Some(nvme) = store.nvme() {
            // A store would do without; here the disk was asked for.
            nvme.open(&name)?;
        }
        if let Some(objects) = store.objects() {
            objects.open(&name)?;
        }
        Ok(Self {
            store,
            namespace,
            block_bytes: block_bytes as usize,
            pinned: Mutex::default(),
        })
    }

    /// The tiers as one.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Stores a block, in a lower tier where memory has none worth less; whether it is there now. Waits while blocks that leave for it are being written below.
    pub fn put(&self, digest: Digest, data: &[u8]) -> Result<bool> {
        self.check(data.len())?;
        self.store.wait_spilled(self.namespace, PATIENCE);
        let host: Arc<dyn Tier> = self.store.host().clone();
        let stored = match block::reserve(&host, self.namespace, None, &[digest]).pop() {
            Some(Reservation::Room(reserved)) => {
                block::register(vec![reserved.fill(&[data])?]);
                true
            }
            // Who is still filling it may fail.
            Some(Reservation::Present) => self.store.host().leading(self.namespace, &[digest]) == 1,
            Some(Reservation::Full) | None => {
                self.store.put_below(self.namespace, digest, data)?
                    || self.store.put_objects(self.namespace, digest, data)?
            }
        };
        self.store.stored();
        Ok(stored)
    }

    /// Copies a block to `out`, verified; where it was. A bad copy is dropped, and the next tier's taken.
    pub fn get(&self, digest: Digest, out: &mut [u8]) -> Result<Option<Kind>> {
        self.check(out.len())?;
        let chain = [digest];
        for _ in 0..TRIES {
            let Some(kind) = self.find(&chain) else {
                return Ok(None);
            };
            let came = self.bring(kind, &chain, Some(&mut *out));
            let host: Arc<dyn Tier> = self.store.host().clone();
            let lease = block::lease(&host, self.namespace, &chain, 1);
            if came {
                return Ok(Some(kind));
            }
            let Some(&slot) = lease.slots().first() else {
                // No room for it there.
                let read = match kind {
                    Kind::Nvme => self.store.read_below(self.namespace, &chain, out)?,
                    Kind::Network => self.store.read_objects(self.namespace, &chain, out)?,
                    Kind::Device | Kind::Host => false,
                };
                if read {
                    return Ok(Some(kind));
                }
                continue;
            };
            self.store.host().wait_arrival(slot);
            match lease.read(0, 0..1, out) {
                Ok(()) => return Ok(Some(kind)),
                Err(Error::Corrupt { .. } | Error::NotFilled) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The uppermost tier that has each block.
    pub fn contains(&self, digests: &[Digest]) -> Vec<Option<Kind>> {
        (digests.iter())
            .map(|digest| {
                self.store
                    .places_of(self.namespace, digest)
                    .first()
                    .copied()
            })
            .collect()
    }

    /// Keeps a block in the host tier until as many `unpin`; false if it is nowhere.
    pub fn pin(&self, digest: Digest) -> bool {
        let chain = [digest];
        if let Some(kind) = self.find(&chain) {
            self.bring(kind, &chain, None);
        }
        let host: Arc<dyn Tier> = self.store.host().clone();
        let lease = block::lease(&host, self.namespace, &chain, 1);
        let Some(&slot) = lease.slots().first() else {
            return false;
        };
        self.store.host().wait_arrival(slot);
        if !self.store.host().holds(self.namespace, &digest) {
            return false;
        }
        self.pinned.lock().entry(digest).or_default().push(lease);
        true
    }

    /// Ends one pin of a block; false if it has none.
    pub fn unpin(&self, digest: Digest) -> bool {
        let mut pinned = self.pinned.lock();
        let Some(leases) = pinned.get_mut(&digest) else {
            return false;
        };
        let lease = leases.pop();
        if leases.is_empty() {
            pinned.remove(&digest);
        }
        drop(pinned);
        lease.is_some()
    }

    /// Makes all blocks outlive the process and the machine, if there is a tier that does. Fails when it is out.
    pub fn flush(&self) -> Result<()> {
        self.store.persist(None)
    }

    /// Ends all pins, and lets go of the disk.
    pub fn close(&self) {
        self.pinned.lock().clear();
        self.store.stop();
    }

    fn find(&self, chain: &[Digest; 1]) -> Option<Kind> {
        if self.store.host().lookup(self.namespace, chain) == 1 {
            return Some(Kind::Host);
        }
        if self.store.lookup_below(self.namespace, chain) {
            return Some(Kind::Nvme);
        }
        let there = self.store.lookup_objects(self.namespace, chain);
        there.then_some(Kind::Network)
    }

    /// Reads a block up that a lower tier has; whether it has been copied to `out`, too.
    fn bring(&self, kind: Kind, chain: &[Digest; 1], out: Option<&mut [u8]>) -> bool {
        if matches!(kind, Kind::Nvme | Kind::Network) {
            // Others leave for it.
            self.store.wait_spilled(self.namespace, PATIENCE);
        }
        match (kind, out) {
            (Kind::Nvme, Some(out)) => return self.store.bring_to(self.namespace, chain, out),
            (Kind::Nvme, None) => self.store.bring(self.namespace, chain),
            (Kind::Network, _) => (self.store).bring_objects(self.namespace, chain, PATIENCE),
            (Kind::Device | Kind::Host, _) => {}
        }
        false
    }

    fn check(&self, bytes: usize) -> Result<()> {
        if bytes == self.block_bytes {
            Ok(())
        } else {
            Err(Error::Invalid(format!(
                "a block has {} bytes, not {bytes}",
                self.block_bytes
            )))
        }
    }
}
