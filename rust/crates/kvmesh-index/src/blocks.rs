//! All blocks: the runs they lie in and the table that finds them.
//!
//! A block has one position in one run from when somebody first stores it until the run's end has
//! shrunk past it: positions that nobody holds go when all positions behind them have gone. So a hole
//! heals in place, and the table changes only at a run's end.

use std::{hint::black_box, sync::atomic::Ordering::Relaxed};

use crossbeam_utils::CachePadded;
use kvmesh_core::SetDigest;

use crate::{
    cover::Key,
    holders::Slot,
    line::{Line, low_bits},
    piece::Piece,
    pool::{Budget, Pool},
    run::{Hashes, Place, Run, Shape},
    sync::{
        Arc, ArcSwap, AtomicU64, AtomicUsize, Guard, Mutex, OnceLock, RwLock, RwLockReadGuard,
        RwLockWriteGuard,
    },
    table::Table,
};

/// What a store ran out of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Short {
    /// The table, of so many buckets.
    Table(usize),
    Memory,
}

/// What a slot holds.
type Tally = Mutex<SetDigest>;

/// Tallies allocated together.
const TALLIES: usize = 64;

pub struct Blocks {
    pub(crate) table: ArcSwap<Table>,
    pub(crate) runs: Pool<Run>,
    pub(crate) lines: Pool<Line>,
    pub(crate) budget: Budget,
    /// Of every slot, by its index.
    tallies: Box<[OnceLock<Box<[Tally; TALLIES]>>]>,
    pub(crate) turns: CachePadded<RwLock<()>>,
    pub(crate) counts: CachePadded<Counts>,
}

/// What writers count. Apart from what matches read: a line that a writer writes has to be fetched anew.
#[derive(Default)]
pub(crate) struct Counts {
    pub distinct: AtomicUsize,
    /// Positions, each with an entry of the table.
    pub placed: AtomicUsize,
    pub runs: AtomicUsize,
    pub forgotten: AtomicU64,
    pub clock: AtomicU64,
    pub forgetting: Mutex<()>,
}

/// A short while of writing. Writers share it, and lock what they change; one that finds nobody else at it
/// needs no locks. Whoever replaces the table has it alone.
pub(crate) struct Turn<'a> {
    pub table: Guard<Arc<Table>>,
    pub alone: bool,
    _turn: (
        Option<RwLockReadGuard<'a, ()>>,
        Option<RwLockWriteGuard<'a, ()>>,
    ),
}

/// A run under its lock.
pub(crate) struct Held<'a> {
    pub id: u32,
    pub run: &'a Run,
    pub shape: Shape,
    pub hashes: Hashes<'a>,
}

impl Blocks {
    pub fn new(max_bytes: Option<usize>, slots: usize) -> Self {
        Self {
            table: ArcSwap::from_pointee(Table::new(0)),
            runs: Pool::new(max_bytes),
            lines: Pool::new(max_bytes),
            budget: Budget::new(max_bytes),
            tallies: (0..slots.div_ceil(TALLIES))
                .map(|_| OnceLock::new())
                .collect(),
            turns: CachePadded::default(),
            counts: CachePadded::default(),
        }
    }

    /// Distinct blocks held.
    pub fn len(&self) -> usize {
        self.counts.distinct.load(Relaxed)
    }

    pub fn runs(&self) -> usize {
        self.counts.runs.load(Relaxed)
    }

    /// Blocks forgotten at the cap, each counted once, whoever held it.
    pub fn forgotten(&self) -> u64 {
        self.counts.forgotten.load(Relaxed)
    }

    /// Bytes asked of the allocator.
    pub fn bytes(&self) -> usize {
        self.budget.used()
    }

    /// The cap on them.
    pub fn max_bytes(&self) -> Option<usize> {
        self.budget.max()
    }

    pub fn tally(&self, slot: Slot) -> SetDigest {
        *self.tally_of(slot).lock()
    }

    pub(crate) fn tally_of(&self, slot: Slot) -> &Tally {
        let group = self.tallies[slot.index() / TALLIES]
            .get_or_init(|| Box::new(std::array::from_fn(|_| Tally::default())));
        &group[slot.index() % TALLIES]
    }

    /// Visits `hashes` piece by piece, a piece being blocks that lie together in one run. Stops at an
    /// unknown block or when `visit` returns false.
    #[inline]
    pub fn walk(
        &self,
        hashes: &[u64],
        entries: &mut Vec<(Key, u64)>,
        mut visit: impl FnMut(Piece<'_>) -> bool,
    ) {
        let table = self.table.load();
        let mut now = self.budget.max().map(|_| self.now());
        let mut at = 0;
        let mut last: Option<&Run> = None;
        while at < hashes.len() {
            let next = last.take().and_then(|run| self.next(run, hashes[at]));
            let Some((place, run, shape)) =
                next.or_else(|| self.find(&table, hashes[at], Shape::len))
            else {
                return;
            };
            let offset = place.offset();
            self.expect(&table, run, hashes.get(at + shape.len() - offset));
            entries.clear();
            let count = Hashes::of(shape, &self.lines)
                .map_or(0, |all| all.common(offset, shape.len(), &hashes[at..]));
            if count == 0
                || !run
                    .cover
                    .read(&self.lines, offset, low_bits(count), entries)
                || !run.still(shape)
            {
                continue; // the run has changed its shape; look again where the block is
            }
            if let Some(now) = &mut now {
                if run.touched() < *now {
                    run.touch(*now);
                }
                *now -= 1;
            }
            let piece = Piece {
                entries,
                offset,
                count,
            };
            if !visit(piece) {
                return;
            }
            at += count;
            last = Some(run);
        }
    }

    /// Brings what the next step reads into the cache while this one goes on: all of a match's time is waiting for memory.
    #[inline]
    fn expect(&self, table: &Table, run: &Run, hash: Option<&u64>) {
        let Some(&hash) = hash else { return };
        black_box(match run.next(hash).and_then(|id| self.run(id)) {
            Some(next) => next.shape().hashes(),
            None => table.touch(hash),
        });
    }

    /// Where a block lies, if in a run that the last one has in mind.
    #[inline]
    fn next(&self, last: &Run, hash: u64) -> Option<(Place, &Run, Shape)> {
        let place = Place::new(last.next(hash)?, 0);
        let (run, shape) = self.verify(place, hash, Shape::len)?;
        Some((place, run, shape))
    }

    /// Where a block lies, below an end that `end` takes from the run's shape.
    #[inline]
    fn find<'a>(
        &'a self,
        table: &Table,
        hash: u64,
        end: impl Fn(Shape) -> usize,
    ) -> Option<(Place, &'a Run, Shape)> {
        table.find(hash, |place| {
            self.verify(place, hash, &end)
                .map(|(run, shape)| (place, run, shape))
        })
    }

    /// The run that `place` names if the block lies there, below an end that `end` takes from its shape.
    #[inline]
    pub(crate) fn verify(
        &self,
        place: Place,
        hash: u64,
        end: impl Fn(Shape) -> usize,
    ) -> Option<(&Run, Shape)> {
        let run = self.run(place.run())?;
        loop {
            let shape = run.shape();
            let found = place.offset() < end(shape)
                && Hashes::of(shape, &self.lines)
                    .is_some_and(|hashes| hashes.get(place.offset()) == hash);
            if run.still(shape) {
                return found.then_some((run, shape));
            }
        }
    }

    #[inline]
    pub(crate) fn run(&self, id: u32) -> Option<&Run> {
        self.runs.get(id, 1).map(|run| &run[0])
    }

    /// Where a block lies or, as writers need to know, is about to.
    pub(crate) fn find_any(&self, table: &Table, hash: u64) -> Option<Place> {
        self.find(table, hash, Shape::capacity)
            .map(|(place, ..)| place)
    }

    pub(crate) fn turn(&self) -> Turn<'_> {
        let alone = self.turns.try_write();
        let shared = alone.is_none().then(|| self.turns.read());
        Turn {
            table: self.table.load(),
            alone: alone.is_some(),
            _turn: (shared, alone),
        }
    }
}
