//! Takes the tier out when its disk does not do, and brings it back.

use std::fmt::Display;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::disk::Disk;
use super::map::{Map, Recorded};
use super::mount::Mount;
use super::{Device, NvmeTier};
use crate::error::{Error, Result};
use crate::tiers::NamespaceId;
use crate::tiers::catalog::{Catalog, Event};
use crate::tiers::slabs::region_bytes_of;

/// How often the disk is looked after.
const EVERY: Duration = Duration::from_millis(500);
/// Longest time between two tries to come back.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is registered outlives the machine after about so long.
const SYNC_EVERY: Duration = Duration::from_secs(5);

/// Tells the thread to end.
#[derive(Default)]
pub(super) struct Stop {
    set: Mutex<bool>,
    changed: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Stop {
    fn is_set(&self) -> bool {
        *self.set.lock()
    }

    fn within(&self, time: Duration) -> bool {
        let mut set = self.set.lock();
        if !*set {
            self.changed.wait_for(&mut set, time);
        }
        *set
    }
}

/// Looks after the tier until it is stopped or dropped.
pub(super) fn start(tier: &Arc<NvmeTier>) {
    let (weak, stop) = (Arc::downgrade(tier), tier.stop.clone());
    let body = move || keep(&weak, &stop);
    // Without the thread the tier works, but does not come back from a failure.
    *tier.stop.thread.lock() = thread::Builder::new()
        .name("kvbm-nvme".into())
        .spawn(body)
        .ok();
}

fn keep(weak: &Weak<NvmeTier>, stop: &Stop) {
    let (mut wait, mut tried) = (EVERY, Instant::now());
    while !stop.within(EVERY) {
        let Some(tier) = weak.upgrade() else {
            return;
        };
        if tier.online().is_ok() {
            tier.look_after();
            (wait, tried) = (EVERY, Instant::now());
        } else if tried.elapsed() >= wait {
            tier.come_back(Duration::ZERO);
            (wait, tried) = ((wait * 2).min(PATIENCE), Instant::now());
        }
    }
}

impl NvmeTier {
    /// Ends its thread and lets go of the disk. Idempotent; there is no way back.
    pub fn stop(&self) {
        *self.stop.set.lock() = true;
        self.stop.changed.notify_all();
        let thread = self.stop.thread.lock().take();
        // The thread itself may be the one that drops the tier.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id())
        {
            let _ = thread.join();
        }
        let device = self.device.write().take();
        if let Some(device) = device {
            let _ = device.map.lock().sync();
        }
    }

    /// Makes what was registered durable, if that was some time ago. Blocks.
    pub(crate) fn sync_if_due(&self) {
        let due = |device: Arc<Device>| device.synced.lock().elapsed() > SYNC_EVERY;
        if self.online().is_ok_and(due) {
            // A failure takes the tier out, which says why.
            let _ = self.sync();
        }
    }

    /// Takes the tier out: it holds nothing and has no room until it comes back.
    pub(super) fn take_out(&self, device: &Arc<Device>, why: &dyn Display) {
        {
            let mut current = self.device.write();
            if !current.as_ref().is_some_and(|now| Arc::ptr_eq(now, device)) {
                return;
            }
            *current = None;
        }
        let mut health = self.health.lock();
        health.problem = Some(why.to_string());
        health.outages += 1;
        drop(health);
        let mut contents = self.contents.lock();
        // Namespaces that fitted once fit again.
        if let Ok(catalog) = contents.emptied(self.bytes, self.policy) {
            contents.replace(catalog, &self.journal, false);
        }
    }

    /// Tries to come back with what the record says; waits so long for another process to let go of the disk.
    pub(super) fn come_back(&self, patience: Duration) {
        match self.attach(patience) {
            Ok(()) => self.health.lock().problem = None,
            Err(error) => self.health.lock().problem = Some(error.to_string()),
        }
    }

    fn attach(&self, patience: Duration) -> Result<()> {
        self.mount.get().map_or(Ok(()), Mount::check)?;
        let disk = Disk::open(&self.dir, self.bytes, patience)?;
        if self.mount.get().is_none() {
            // No other thread does this.
            let _ = self.mount.set(Mount::of(&self.dir)?);
        }
        let (mut map, recorded) = Map::open(&self.dir)?;
        // Slots keep their places where regions keep their size; else what was there is given up.
        let kept = recorded.region_bytes == Some(region_bytes_of(self.bytes));
        let recorded = if kept { recorded } else { Recorded::default() };
        loop {
            let (known, emptied) = {
                let contents = self.contents.lock();
                (
                    contents.namespaces(),
                    contents.emptied(self.bytes, self.policy),
                )
            };
            let mut catalog = emptied?;
            let restored = restore(&mut catalog, &recorded);
            let namespaces: Vec<_> = catalog.known_namespaces().cloned().collect();
            map.rewrite(
                catalog.region_bytes(),
                &namespaces,
                &catalog.recorded_blocks(),
            )?;
            let mut current = self.device.write();
            let mut contents = self.contents.lock();
            if contents.namespaces() != known {
                // Another one was opened meanwhile, and has a number.
                continue;
            }
            if self.stop.is_set() {
                return Ok(());
            }
            contents.replace(catalog, &self.journal, true);
            drop(contents);
            {
                let mut health = self.health.lock();
                (health.io, health.recovered) = (disk.describe(), restored as u64);
            }
            *current = Some(Arc::new(Device {
                disk,
                map: Mutex::new(map),
                synced: Mutex::new(Instant::now()),
            }));
            return Ok(());
        }
    }

    fn look_after(&self) {
        let Ok(device) = self.online() else {
            return;
        };
        let silent = device.disk.silent();
        if silent > self.patience {
            let why = Error::Silent {
                path: self.dir.clone(),
                seconds: silent.as_secs(),
            };
            return self.take_out(&device, &why);
        }
        let checked = device.disk.check().and_then(|()| self.shorten(&device));
        if let Err(error) = checked {
            self.take_out(&device, &error);
        }
    }

    /// Writes the record anew when it is mostly history.
    fn shorten(&self, device: &Device) -> Result<()> {
        // A transfer that hangs may hold the lock; the next look sees that.
        let Some(mut map) = device.map.try_lock() else {
            return Ok(());
        };
        let (region_bytes, namespaces, blocks) = {
            let mut contents = self.contents.lock();
            if !contents.online || !map.is_stale(contents.catalog.stats().blocks) {
                return Ok(());
            }
            // These are in what is written now.
            contents.catalog.take_events();
            (
                contents.catalog.region_bytes(),
                contents.namespaces(),
                contents.catalog.recorded_blocks(),
            )
        };
        map.rewrite(region_bytes, &namespaces, &blocks)
    }
}

/// Opens the recorded namespaces and puts their blocks where they were; those whose namespace does not fit any more are
/// left out.
fn restore(catalog: &mut Catalog, recorded: &Recorded) -> usize {
    let numbers: Vec<Option<NamespaceId>> = (recorded.namespaces.iter())
        .map(|namespace| catalog.open(namespace).ok())
        .collect();
    let stored: Vec<Event> = (recorded.stored.iter())
        .filter_map(|event| match *event {
            Event::Stored {
                slot,
                namespace,
                digest,
                parent,
            } => Some(Event::Stored {
                slot,
                namespace: (*numbers.get(namespace.0 as usize)?)?,
                digest,
                parent,
            }),
            Event::Removed { .. } => None,
        })
        .collect();
    catalog.restore(&stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::Policy;

    const PATIENCE: Duration = Duration::from_millis(50);

    fn settled(done: impl Fn() -> bool) {
        let begun = Instant::now();
        while !done() {
            assert!(begun.elapsed() < Duration::from_secs(30), "not in time");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_disk_that_does_not_answer_is_taken_out_and_comes_back_when_it_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let bytes = 1 << 20;
        let tier = NvmeTier::with_patience(dir.path(), bytes, Policy::default(), PATIENCE);
        let device = tier.online().expect("a disk");
        let hung = device.disk.begin();
        settled(|| tier.health().problem.is_some());
        let health = tier.health();
        let why = health.problem.unwrap_or_default();
        assert!(why.contains("has not answered"), "{why}");
        assert_eq!(health.outages, 1);
        assert!(tier.working().is_err());
        // The transfer holds the file: until it ends nobody else can have it.
        drop(hung);
        drop(device);
        settled(|| tier.working().is_ok());
        assert_eq!(tier.health().problem, None);
        tier.stop();
    }
}
