//! Blocks at rest are read and checked, all of them again and again at a bounded rate, so that a bad one is found before
//! somebody waits for it. A copy in one tier that turns out to be bad makes those in the others be checked at once.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvmesh_core::{Digest, Tier as Kind};
use parking_lot::{Condvar, Mutex};

use super::Shared;
use crate::error::{Error, Result};
use crate::tiers::{NamespaceId, Slot, Tier};

/// Blocks checked between two pauses.
const BATCH: usize = 16;

/// How blocks at rest are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubSettings {
    /// Bytes read a second, over all tiers.
    pub bytes_per_s: u64,
    /// From the end of a pass over all tiers to the next.
    pub pause: Duration,
}

/// What the passes over a tier came to, since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Blocks checked.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks dropped, copies of those that were bad in another tier included.
    pub corrupt: u64,
    /// Passes that saw all of the tier.
    pub passes: u64,
}

/// Some blocks of a tier that were checked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// How many.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// The bad ones, which are dropped: where they were, of all tiers.
    pub corrupt: Vec<(Kind, Digest)>,
    /// Where to go on; None: that was all.
    pub next: Option<Slot>,
}

/// Reads blocks for nothing but their checksums.
#[derive(Clone)]
pub(super) struct Checker {
    pub(super) shared: Arc<Shared>,
    pub(super) tiers: Vec<Arc<dyn Tier>>,
}

impl Checker {
    /// Checks blocks of a tier from the one behind `after` on. Fails when the tier does. Blocks.
    pub(super) fn check(
        &self,
        tier: &Arc<dyn Tier>,
        after: Option<Slot>,
        limit: usize,
    ) -> Result<Checked> {
        let held = tier.walk(after, limit);
        let mut checked = Checked {
            next: held.last().map(|block| block.slot),
            ..Checked::default()
        };
        let (mut bad, mut failure, mut scratch) = (Vec::new(), Ok(()), Vec::new());
        for block in &held {
            if failure.is_ok() {
                match read(tier, block.namespace, block.slot, &mut scratch) {
                    Ok(()) => {}
                    Err(Error::Corrupt { .. }) => bad.push((block.namespace, block.digest)),
                    Err(error) => failure = Err(error),
                }
                checked.blocks += 1;
                checked.bytes += scratch.len() as u64;
            }
            tier.release(&[block.slot]);
        }
        for (namespace, digest) in bad {
            let Some(kind) = tier.kind() else {
                continue;
            };
            checked.corrupt.push((kind, digest));
            let copies = self.check_copies(kind, namespace, &digest, &mut scratch);
            checked.corrupt.extend(copies);
        }
        failure.map(|()| checked)
    }

    /// Checks the copies of a block in tiers other than `from`, whose number its namespace has; those that are bad.
    pub(super) fn check_copies(
        &self,
        from: Kind,
        namespace: NamespaceId,
        digest: &Digest,
        scratch: &mut Vec<u8>,
    ) -> Vec<(Kind, Digest)> {
        let mut bad = Vec::new();
        for other in &self.tiers {
            let Some(to) = other.kind().filter(|&to| to != from) else {
                continue;
            };
            let Some(namespace) = self.shared.translate(from, namespace, to) else {
                continue;
            };
            if let Some(slot) = other.hold(namespace, digest) {
                if matches!(
                    read(other, namespace, slot, scratch),
                    Err(Error::Corrupt { .. })
                ) {
                    bad.push((to, *digest));
                }
                other.release(&[slot]);
            }
        }
        bad
    }
}

/// Reads a leased block, which its tier drops if it is bad.
fn read(
    tier: &Arc<dyn Tier>,
    namespace: NamespaceId,
    slot: Slot,
    scratch: &mut Vec<u8>,
) -> Result<()> {
    let layout = tier.layout(namespace);
    let segments = layout.segments();
    scratch.resize(segments.iter().map(|segment| segment.bytes).sum(), 0);
    tier.read(slot, 0..segments.len(), scratch)
}

/// The thread that goes over the tiers.
pub(super) struct Scrubber {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Work {
    checker: Checker,
    settings: ScrubSettings,
    totals: Mutex<Vec<(Kind, Scrubbed)>>,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Scrubber {
    pub(super) fn start(checker: Checker, settings: ScrubSettings) -> Result<Self> {
        let kinds = checker.tiers.iter().filter_map(|tier| tier.kind());
        let work = Arc::new(Work {
            totals: Mutex::new(kinds.map(|kind| (kind, Scrubbed::default())).collect()),
            checker,
            settings,
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        });
        let of_thread = work.clone();
        let thread = thread::Builder::new()
            .name("kvbm-scrub".into())
            .spawn(move || of_thread.run())
            .map_err(Error::io("cannot start", "the scrubber's thread"))?;
        Ok(Self {
            work,
            thread: Mutex::new(Some(thread)),
        })
    }

    pub(super) fn totals(&self) -> Vec<(Kind, Scrubbed)> {
        self.work.totals.lock().clone()
    }

    pub(super) fn stop(&self) {
        *self.work.stop.lock() = true;
        self.work.stopped.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Work {
    fn run(&self) {
        loop {
            for (number, tier) in self.checker.tiers.iter().enumerate() {
                if self.pass(number, tier) {
                    return;
                }
            }
            if self.stops_within(self.settings.pause) {
                return;
            }
        }
    }

    /// Checks all of a tier; whether it is time to stop.
    fn pass(&self, number: usize, tier: &Arc<dyn Tier>) -> bool {
        let mut after = None;
        loop {
            // A tier that fails is out, and says so itself.
            let Ok(checked) = self.checker.check(tier, after, BATCH) else {
                return self.stops_within(Duration::ZERO);
            };
            {
                let mut totals = self.totals.lock();
                for (kind, _) in &checked.corrupt {
                    let of_kind = totals.iter_mut().filter(|(other, _)| other == kind);
                    of_kind.for_each(|(_, total)| total.corrupt += 1);
                }
                let (_, total) = &mut totals[number];
                total.blocks += checked.blocks;
                total.bytes += checked.bytes;
                total.passes += u64::from(checked.next.is_none());
            }
            let seconds = checked.bytes as f64 / self.settings.bytes_per_s as f64;
            let time = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
            if self.stops_within(time) {
                return true;
            }
            after = checked.next;
            if after.is_none() {
                return false;
            }
        }
    }

    fn stops_within(&self, time: Duration) -> bool {
        let mut stop = self.stop.lock();
        if !*stop {
            self.stopped.wait_while_for(&mut stop, |stop| !*stop, time);
        }
        *stop
    }
}
