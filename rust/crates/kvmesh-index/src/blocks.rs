//! All blocks: the runs they lie in and the table that finds them.
//!
//! A block has one position in one run from when somebody first stores it until the run's end has
//! shrunk past it: positions that nobody holds go when all positions behind them have gone. So a hole
//! heals in place, and the table changes only at a run's end.

use std::sync::atomic::Ordering::Relaxed;

use crossbeam_utils::CachePadded;
use kvmesh_core::SetDigest;

use crate::{
    holders::Slot,
    line::Line,
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

/// Of one slot.
#[derive(Default)]
pub(crate) struct Tally {
    /// What it holds.
    pub held: SetDigest,
    /// Blocks of it forgotten at the cap since it was last cleared.
    pub forgotten: u64,
}

/// Tallies allocated together.
const TALLIES: usize = 64;
type Tallies = [Mutex<Tally>; TALLIES];

pub struct Blocks {
    pub(crate) table: ArcSwap<Table>,
    pub(crate) runs: Pool<Run>,
    pub(crate) lines: Pool<Line>,
    pub(crate) budget: Budget,
    /// Of every slot, by its index.
    tallies: Box<[OnceLock<Box<Tallies>>]>,
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

/// Where a block lies: a run, what its positions meant, and the block's.
pub(crate) struct Found<'a> {
    pub run: &'a Run,
    pub shape: Shape,
    pub hashes: Hashes<'a>,
    pub offset: usize,
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

    pub fn held(&self, slot: Slot) -> SetDigest {
        self.tally_of(slot).lock().held
    }

    /// Blocks of a slot forgotten at the cap since it was last cleared.
    pub fn forgotten_of(&self, slot: Slot) -> u64 {
        self.tally_of(slot).lock().forgotten
    }

    pub(crate) fn tally_of(&self, slot: Slot) -> &Mutex<Tally> {
        let group = self.tallies[slot.index() / TALLIES]
            .get_or_init(|| Box::new(std::array::from_fn(|_| Mutex::default())));
        &group[slot.index() % TALLIES]
    }

    /// The run that `place` names if the block lies there, below an end that `end` takes from its shape. What is found
    /// counts only if the run still has this shape when it was read.
    #[inline]
    pub(crate) fn look(
        &self,
        place: Place,
        hash: u64,
        end: impl Fn(Shape) -> usize,
    ) -> Option<Found<'_>> {
        let run = self.run(place.run())?;
        let offset = place.offset();
        loop {
            let shape = run.shape();
            if offset < end(shape) {
                if let Some(hashes) = Hashes::of(shape, &self.lines) {
                    if hashes.get(offset) == hash {
                        return Some(Found {
                            run,
                            shape,
                            hashes,
                            offset,
                        });
                    }
                }
            }
            if run.still(shape) {
                return None;
            }
        }
    }

    #[inline]
    pub(crate) fn run(&self, id: u32) -> Option<&Run> {
        self.runs.get(id, 1).map(|run| &run[0])
    }

    /// Asks for the run in which the first block may lie, by an entry of the table that has been asked for.
    #[inline]
    pub(crate) fn expect_run(&self, table: &Table, hashes: &[u64]) {
        let place = hashes.first().and_then(|&hash| table.find(hash, Some));
        if let Some(place) = place {
            self.runs.expect(place.run(), 1);
        }
    }

    /// Asks for the hashes of that run.
    #[inline]
    pub(crate) fn expect_hashes(&self, table: &Table, hashes: &[u64]) {
        let place = hashes.first().and_then(|&hash| table.find(hash, Some));
        if let Some(run) = place.and_then(|place| self.run(place.run())) {
            self.expect_lines(run.shape());
        }
    }

    /// Asks for the hashes that a shape names.
    #[inline]
    pub(crate) fn expect_lines(&self, shape: Shape) {
        self.lines.expect(shape.hashes(), shape.lines());
    }

    /// Where a block lies or, as writers need to know, is about to.
    pub(crate) fn find_any(&self, table: &Table, hash: u64) -> Option<Place> {
        table.find(hash, |place| {
            self.look(place, hash, Shape::capacity).map(|_| place)
        })
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
