//! The nvme tier: blocks in a preallocated file on a local disk, which outlive the process.
//!
//! * [`disk`] is the slab file and [`io`] the way bytes get there and back; [`map`] records what every slot holds;
//!   [`contents`] is that in memory; [`tier`] makes it one.
//! * A disk that fails, fills up, vanishes or does not answer takes the tier out: it is empty and full at once, and
//!   says why. Then it is tried again and again, and comes back with what its record says.

mod disk;
mod io;
mod keeper;
mod map;
mod mount;
mod tier;
mod transfers;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub(crate) use io::{Direction, Transfer};
use kvmesh_core::Digest;
use parking_lot::{Mutex, RwLock};
pub(crate) use transfers::Writes;

use self::disk::Disk;
use self::keeper::Stop;
use self::map::Map;
use self::mount::Mount;
use super::catalog::Event;
use super::contents::Contents;
use super::{NamespaceId, Slot};
use crate::error::{Error, Result};
use crate::eviction::Policy;
use crate::journal::Journal;
use crate::latency::{Latency, Observed};
use crate::namespace::Namespace;

/// A disk that has not answered for so long is taken out.
const SILENT: Duration = Duration::from_secs(10);

/// A process that was killed keeps its lock until the kernel has ended its transfers, which takes it milliseconds.
const KILLED: Duration = Duration::from_secs(3);

/// Whether the tier works, and what it has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Health {
    /// Why it does not work now.
    pub problem: Option<String>,
    /// How bytes are moved.
    pub io: String,
    /// Times it was taken out.
    pub outages: u64,
    /// Blocks it had when it came online last.
    pub recovered: u64,
    /// Bytes written to the slab file.
    pub written_bytes: u64,
    /// Bytes read from it.
    pub read_bytes: u64,
}

/// Blocks on a disk.
pub struct NvmeTier {
    dir: PathBuf,
    bytes: u64,
    policy: Policy,
    /// Where its disk was when it first came online: it comes back only to one that is mounted there.
    mount: OnceLock<Mount>,
    contents: Mutex<Contents>,
    journal: Journal,
    /// None: the tier is out. Before `contents`, where both are locked.
    device: RwLock<Option<Arc<Device>>>,
    health: Mutex<Health>,
    reads: Latency,
    writes: Latency,
    /// Longer without an answer, the disk is taken out.
    patience: Duration,
    stop: Arc<Stop>,
}

/// The open files.
struct Device {
    disk: Disk,
    /// Before `contents`, where both are locked.
    map: Mutex<Map>,
    /// When both were made durable.
    synced: Mutex<Instant>,
}

impl NvmeTier {
    /// A tier of `bytes` in `dir`, which is its alone, with what it held before. Where the disk is not to be had, the
    /// tier is out until it is. A thread of its own looks after it.
    pub fn new(dir: &Path, bytes: u64, policy: Policy) -> Arc<Self> {
        Self::with_patience(dir, bytes, policy, SILENT)
    }

    /// The same with another time that the disk may be silent for.
    fn with_patience(dir: &Path, bytes: u64, policy: Policy, patience: Duration) -> Arc<Self> {
        let tier = Arc::new(Self {
            dir: dir.to_owned(),
            bytes,
            policy,
            mount: OnceLock::new(),
            contents: Mutex::new(Contents::nothing(bytes, policy)),
            journal: Journal::default(),
            device: RwLock::new(None),
            health: Mutex::default(),
            reads: Latency::default(),
            writes: Latency::default(),
            patience,
            stop: Arc::default(),
        });
        tier.come_back(KILLED);
        keeper::start(&tier);
        tier
    }

    /// Whether it works, and what it has done.
    pub fn health(&self) -> Health {
        self.health.lock().clone()
    }

    /// How long reads and writes of blocks took.
    pub(crate) fn latencies(&self) -> (Observed, Observed) {
        (self.reads.observed(), self.writes.observed())
    }

    /// The namespaces it knows, by their numbers.
    pub(crate) fn namespaces(&self) -> Vec<Namespace> {
        self.contents.lock().namespaces()
    }

    /// What is there, each with its parent, the longest unused first.
    pub(crate) fn by_use(&self) -> Vec<(NamespaceId, Digest, Option<Digest>)> {
        self.contents.lock().catalog.by_use()
    }

    /// Whether the block can be read. Counts as no look-up.
    pub(crate) fn holds(&self, namespace: NamespaceId, digest: &Digest) -> bool {
        self.contents.lock().catalog.holds(namespace, digest)
    }

    /// Leading blocks of the chain. Counts as no look-up.
    pub(crate) fn leading(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        self.contents.lock().catalog.leading(namespace, chain)
    }

    /// Makes everything registered so far outlive the machine. Fails when the tier is out, or goes out. Blocks.
    pub fn sync(&self) -> Result<()> {
        // What others have registered they may not have put on record yet.
        self.record();
        let device = self.online()?;
        let synced = (device.disk.sync()).and_then(|()| device.map.lock().sync());
        if let Err(error) = &synced {
            self.take_out(&device, error);
        } else {
            *device.synced.lock() = Instant::now();
        }
        synced
    }

    /// These cannot be read.
    fn forget(&self, lost: &[Slot]) {
        {
            let mut contents = self.contents.lock();
            for &slot in lost {
                if let Some(slot) = contents.inside(slot) {
                    contents.catalog.forget(&self.journal, slot, false);
                }
            }
        }
        self.record();
    }

    /// Puts on record what has happened to slots.
    fn record(&self) {
        while let Ok(device) = self.online() {
            let recorded = {
                // It may be here that a disk does not answer.
                let _timed = device.disk.begin();
                let mut map = device.map.lock();
                let Some((namespaces, events)) = self.unrecorded(&device, &map) else {
                    continue;
                };
                map.append(&namespaces, &events)
            };
            if let Err(error) = recorded {
                self.take_out(&device, &error);
            }
            return;
        }
        self.contents.lock().catalog.take_events();
    }

    /// What `map` does not say yet; `None` once the tier has gone out: after a return, it is another map's.
    fn unrecorded(&self, device: &Arc<Device>, map: &Map) -> Option<(Vec<Namespace>, Vec<Event>)> {
        let current = self.device.read();
        let mut contents = current
            .as_ref()
            .filter(|now| Arc::ptr_eq(now, device))
            .map(|_| self.contents.lock())?;
        // Whoever opens a namespace does not wait for the disk.
        let known = contents.catalog.known_namespaces();
        let new = known.skip(map.namespaces()).cloned().collect();
        Some((new, contents.catalog.take_events()))
    }

    /// Fails when the tier is out.
    pub(crate) fn working(&self) -> Result<()> {
        self.online().map(drop)
    }

    /// The next write waits until the first is dropped; the second says whether one waits.
    #[cfg(test)]
    pub(crate) fn hold_next_write(
        &self,
    ) -> Result<(std::sync::mpsc::Sender<()>, impl Fn() -> bool + use<>)> {
        let device = self.online()?;
        Ok((device.disk.hold_next(), move || device.disk.is_holding()))
    }

    fn online(&self) -> Result<Arc<Device>> {
        let device = self.device.read().clone();
        device.ok_or_else(|| Error::Offline(self.dir.clone()))
    }
}

impl Drop for NvmeTier {
    fn drop(&mut self) {
        self.stop();
    }
}
