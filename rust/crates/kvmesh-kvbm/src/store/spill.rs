//! Blocks that leave next go to the disk, a batch at a time, on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::admission::{Admission, Verdict};
use super::{Flow, Open, Shared};
use crate::block::{self, Reservation, Reserved};
use crate::error::{Error, Result};
use crate::image::AT_REST;
use crate::tiers::{Direction, Leaving, NvmeTier, Tier, Transfer};

/// Blocks of a batch.
const BATCH: usize = 32;
/// Bytes of a batch, unless one block has more.
const BATCH_BYTES: usize = 32 << 20;
/// How often it looks for work without being woken.
const IDLE: Duration = Duration::from_millis(200);
/// The first page of an image is written from a copy, because its first word differs.
const PAGE: usize = crate::image::ALIGNMENT;

/// The writer. Blocks are written on its thread, or on that of a caller of `write_everything`.
pub(super) struct Spiller {
    work: Arc<Work>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Work {
    shared: Arc<Shared>,
    nvme: Arc<NvmeTier>,
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
}

/// A block with a place on the disk.
struct Placed {
    leaving: Leaving,
    reserved: Reserved,
    open: Arc<Open>,
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
        let of_thread = work.clone();
        let thread = thread::Builder::new()
            .name("kvbm-spill".into())
            .spawn(move || of_thread.run())
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

    /// Writes the blocks of the host tier that are not on the disk, those used last first, and makes them outlive the
    /// machine.
    pub(super) fn write_everything(&self, within: Option<Duration>) -> Result<()> {
        let begun = Instant::now();
        let all = self.work.shared.host.everything();
        let mut written = Ok(());
        for batch in all.rchunks(BATCH) {
            if within.is_some_and(|within| begun.elapsed() > within) {
                let host = &self.work.shared.host;
                batch.iter().for_each(|block| host.spilled(block));
            } else {
                written = written.and(self.work.write(batch.to_vec(), true));
            }
        }
        written.and_then(|()| self.work.nvme.sync())
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
    fn run(&self) {
        loop {
            {
                let mut signal = self.signal.lock();
                if !signal.wake && !signal.stop {
                    self.woken.wait_for(&mut signal, IDLE);
                }
                if signal.stop {
                    return;
                }
                signal.wake = false;
            }
            loop {
                let leaving = self.shared.host.leaving(BATCH);
                if leaving.is_empty() || self.signal.lock().stop {
                    leaving
                        .iter()
                        .for_each(|block| self.shared.host.spilled(block));
                    break;
                }
                // What fails is counted, and leaves unwritten.
                let _ = self.write(leaving, false);
            }
            self.nvme.sync_if_due();
        }
    }

    /// Writes those that are not on the disk and are worth it, or all. Fails with the first failure of the disk.
    fn write(&self, leaving: Vec<Leaving>, all: bool) -> Result<()> {
        let mut failure = Ok(());
        let mut placed = Vec::new();
        for block in leaving {
            match self.place(block, all) {
                Ok(Some(block)) => placed.push(block),
                Ok(None) => {}
                Err(error) => failure = failure.and(Err(error)),
            }
        }
        while !placed.is_empty() {
            let slot_bytes = placed[0].open.layout.slot_bytes();
            let count = (BATCH_BYTES / slot_bytes).clamp(1, placed.len());
            let rest = placed.split_off(count);
            failure = failure.and(self.write_batch(placed));
            placed = rest;
        }
        failure
    }

    /// A place for the block, if it is to be written; else it is done. Fails where it should have one.
    fn place(&self, leaving: Leaving, all: bool) -> Result<Option<Placed>> {
        let placed = self.try_place(&leaving, all);
        if !matches!(placed, Ok(Some(_))) {
            self.shared.host.spilled(&leaving);
        }
        let reserved = placed?;
        Ok(reserved.map(|(reserved, open)| Placed {
            leaving,
            reserved,
            open,
        }))
    }

    fn try_place(&self, leaving: &Leaving, all: bool) -> Result<Option<(Reserved, Arc<Open>)>> {
        let open = self.shared.open(leaving.namespace);
        let Some(below) = open.below else {
            return Ok(None);
        };
        if self.nvme.holds(below, &leaving.digest) {
            return Ok(None);
        }
        let bytes = open.layout.slot_bytes() as u64;
        let refused = if all {
            self.admission.lock().spend(bytes);
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
            return Ok(None);
        }
        let host = &self.shared.host;
        if (host.proven(leaving.slot, &leaving.digest, &open.layout)).is_none() {
            host.discard(leaving.slot);
            return Ok(None);
        }
        let tier: Arc<dyn Tier> = self.nvme.clone();
        let chain = [leaving.digest];
        let mut rooms = block::reserve(&tier, below, leaving.parent.as_ref(), &chain);
        match rooms.pop() {
            Some(Reservation::Room(reserved)) => Ok(Some((reserved, open))),
            Some(Reservation::Present) => Ok(None),
            Some(Reservation::Full) | None => {
                self.unplaced.fetch_add(1, Ordering::Relaxed);
                self.nvme.working().map(|()| None)
            }
        }
    }

    fn write_batch(&self, batch: Vec<Placed>) -> Result<()> {
        let arena = self.shared.host.arena();
        let mut heads = match memmap2::MmapMut::map_anon(PAGE * batch.len()) {
            Ok(heads) => heads,
            Err(error) => {
                batch
                    .iter()
                    .for_each(|block| self.shared.host.spilled(&block.leaving));
                return Err(Error::io("cannot get memory for", "a batch")(error));
            }
        };
        for (head, block) in heads.chunks_exact_mut(PAGE).zip(&batch) {
            head.copy_from_slice(&arena.read(block.leaving.slot.0, PAGE));
            head[..8].copy_from_slice(&AT_REST.to_le_bytes());
        }
        let slots: Vec<_> = batch.iter().map(|block| block.reserved.slot()).collect();
        let base = heads.as_mut_ptr();
        let mut transfer = |place, number: usize| {
            let block = &batch[number];
            let rest = block.open.layout.slot_bytes() - PAGE;
            let slot = block.leaving.slot.0;
            let head = (base.wrapping_add(number * PAGE), PAGE);
            let pieces = match rest {
                0 => vec![head],
                _ => vec![head, (arena.at(slot + PAGE as u64, rest), rest)],
            };
            // SAFETY: `heads` and the arena outlive the transfers. The slot is leased: nobody writes it but a faulty
            // process, whose bytes do not have the checksums of the head any more.
            unsafe { Transfer::new(Direction::Write, place, &pieces) }
        };
        let mut results: Vec<Option<Result<()>>> = batch.iter().map(|_| None).collect();
        self.nvme.write(&slots, &mut transfer, |number, result| {
            results[number] = Some(result);
        });
        let mut failure = Ok(());
        for (block, result) in batch.into_iter().zip(results) {
            let written = result.unwrap_or(Err(Error::NotFilled));
            match written.and_then(|()| block.reserved.seal()) {
                Ok(filled) => {
                    block::register(vec![filled]);
                    self.spilled.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.unplaced.fetch_add(1, Ordering::Relaxed);
                    failure = failure.and(Err(error));
                }
            }
            self.shared.host.spilled(&block.leaving);
        }
        failure
    }
}
