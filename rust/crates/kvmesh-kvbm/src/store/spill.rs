//! Blocks go to the disk before they leave, or because somebody asks: what is written, and where it goes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::admission::{Admission, Verdict};
use super::flush::Flush;
use super::writer::Writer;
use super::{Flow, Open, Shared};
use crate::block::{self, Reservation, Reserved};
use crate::error::{Error, Result};
use crate::tiers::{Leaving, NamespaceId, NvmeTier, Tier};

/// How often the writer looks for work without being woken.
const IDLE: Duration = Duration::from_millis(200);

/// The writer, for its callers.
pub(super) struct Spiller {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the writer and its callers share.
pub(super) struct Work {
    pub(super) shared: Arc<Shared>,
    pub(super) nvme: Arc<NvmeTier>,
    admission: Mutex<Admission>,
    begun: Instant,
    signal: Mutex<Signal>,
    woken: Condvar,
    spilled: AtomicU64,
    unlikely: AtomicU64,
    over_budget: AtomicU64,
    unplaced: AtomicU64,
}

#[derive(Default)]
struct Signal {
    wake: bool,
    stop: bool,
    flushes: VecDeque<Flush>,
}

/// Where a block of memory belongs on the disk.
pub(super) enum Place {
    /// Here.
    Room(Reserved, Arc<Open>),
    /// It is there, in this namespace.
    There(NamespaceId),
    /// Somebody is writing it.
    Busy,
    /// It is not written, and why.
    Nowhere(String),
}

impl Spiller {
    pub(super) fn start(
        shared: &Arc<Shared>,
        nvme: &Arc<NvmeTier>,
        bytes_per_day: Option<u64>,
    ) -> Result<Self> {
        let work = Arc::new(Work {
            shared: shared.clone(),
            nvme: nvme.clone(),
            admission: Mutex::new(Admission::new(bytes_per_day)),
            begun: Instant::now(),
            signal: Mutex::default(),
            woken: Condvar::new(),
            spilled: AtomicU64::new(0),
            unlikely: AtomicU64::new(0),
            over_budget: AtomicU64::new(0),
            unplaced: AtomicU64::new(0),
        });
        let mut writer = Writer::new(work.clone())?;
        let thread = thread::Builder::new()
            .name("kvbm-spill".into())
            .spawn(move || writer.run())
            .map_err(Error::io("cannot start", "the disk tier's threads"))?;
        Ok(Self {
            work,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// There may be work.
    pub(super) fn wake(&self) {
        self.work.signal.lock().wake = true;
        self.work.woken.notify_all();
    }

    /// Has the blocks of the host tier that are not on the disk written, those used last first, and makes them outlive
    /// the machine. Waits no longer than `within`, or until the disk is out.
    pub(super) fn write_everything(&self, within: Option<Duration>) -> Result<()> {
        let work = &self.work;
        work.nvme.working()?;
        let until = within.and_then(|within| Instant::now().checked_add(within));
        let blocks = work.shared.host.everything().into_iter().rev().collect();
        let (mut flush, answer) = Flush::new(blocks, until);
        let mut signal = work.signal.lock();
        if signal.stop {
            flush.lose_all(&work.shared, "the store was stopped");
            flush.end(&work.nvme);
        } else {
            signal.flushes.push_back(flush);
        }
        drop(signal);
        work.woken.notify_all();
        answer.wait(&work.nvme, until)
    }

    pub(super) fn flow(&self) -> Flow {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Flow {
            spilled: of(&self.work.spilled),
            unlikely: of(&self.work.unlikely),
            over_budget: of(&self.work.over_budget),
            unplaced: of(&self.work.unplaced),
            ..Flow::default()
        }
    }

    pub(super) fn stop(&self) {
        self.work.signal.lock().stop = true;
        self.work.woken.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

impl Work {
    /// Waits until there may be work; false: there is none any more.
    pub(super) fn wait(&self) -> bool {
        let mut signal = self.signal.lock();
        if !signal.wake && !signal.stop && signal.flushes.is_empty() {
            self.woken.wait_for(&mut signal, IDLE);
        }
        signal.wake = false;
        !signal.stop
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.signal.lock().stop
    }

    pub(super) fn next_flush(&self) -> Option<Flush> {
        self.signal.lock().flushes.pop_front()
    }

    /// Of a writer that ends.
    pub(super) fn all_flushes(&self) -> VecDeque<Flush> {
        std::mem::take(&mut self.signal.lock().flushes)
    }

    /// So many were written, and so many could not be.
    pub(super) fn count(&self, written: usize, failed: usize) {
        self.spilled.fetch_add(written as u64, Ordering::Relaxed);
        self.unplaced.fetch_add(failed as u64, Ordering::Relaxed);
    }

    /// A place for a block that is not on the disk and is worth it; with `anyway`, whatever it is worth.
    pub(super) fn place(&self, leaving: &Leaving, anyway: bool) -> Place {
        let open = self.shared.open(leaving.namespace);
        let Some(below) = open.below else {
            return Place::Nowhere("the disk has no room for blocks of this size".into());
        };
        if self.nvme.holds(below, &leaving.digest) {
            return Place::There(below);
        }
        let bytes = open.layout.slot_bytes() as u64;
        let refused = if anyway {
            None
        } else {
            let now = self.begun.elapsed().as_secs_f64();
            match self.admission.lock().ask(bytes, leaving.chance, now) {
                Verdict::Write => None,
                Verdict::Unlikely => Some(&self.unlikely),
                Verdict::OverBudget => Some(&self.over_budget),
            }
        };
        if let Some(count) = refused {
            count.fetch_add(1, Ordering::Relaxed);
            return Place::Nowhere("it is not worth writing".into());
        }
        let host = &self.shared.host;
        if (host.proven(leaving.slot, &leaving.digest, &open.layout)).is_none() {
            host.discard(leaving.slot);
            return Place::Nowhere("its bytes in memory are wrong".into());
        }
        let tier: Arc<dyn Tier> = self.nvme.clone();
        let reserve = match anyway {
            true => block::reserve_anyway,
            false => block::reserve,
        };
        match reserve(&tier, below, leaving.parent.as_ref(), &[leaving.digest]).pop() {
            Some(Reservation::Room(reserved)) => {
                if anyway {
                    self.admission.lock().spend(bytes);
                }
                Place::Room(reserved, open)
            }
            Some(Reservation::Present) => Place::Busy,
            Some(Reservation::Full) | None => {
                self.unplaced.fetch_add(1, Ordering::Relaxed);
                let working = self.nvme.working();
                let full = || "the disk has no room that may be taken".into();
                Place::Nowhere(working.map_or_else(|error| error.to_string(), |()| full()))
            }
        }
    }
}
