//! All blocks: the runs they lie in and the table that finds them.
//!
//! A block has one position in one run from when somebody first stores it until the run's end has
//! shrunk past it: positions that nobody holds go when all positions behind them have gone. So a hole
//! heals in place, and the table changes only at a run's end.

use std::sync::atomic::Ordering::Relaxed;

use crossbeam_utils::CachePadded;
use kvmesh_core::SetDigest;

use crate::{
    cover::Key,
    holders::Slot,
    line::{LINE_WORDS, Line, low_bits},
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

/// Equal blocks of a run after which a match is likely to pass all of it.
const NEAR: usize = 2 * LINE_WORDS;

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

/// Where a block lies: a run, what its positions meant, and the block's.
pub(crate) struct Found<'a> {
    run: &'a Run,
    shape: Shape,
    hashes: Hashes<'a>,
    offset: usize,
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
    /// unknown block or when `visit` returns false. `parting` is where the last walk left its first run: prompts mostly
    /// part from one another at the same place, behind the start that they have in common.
    #[inline]
    pub fn walk(
        &self,
        hashes: &[u64],
        entries: &mut Vec<(Key, u64)>,
        parting: &mut usize,
        mut visit: impl FnMut(Piece<'_>) -> bool,
    ) {
        let table = self.table.load();
        let mut now = self.budget.max().map(|_| self.now());
        // It is fetched while the first run is read.
        table.expect(hashes.get(*parting..=*parting).unwrap_or(&[]));
        let mut rest = hashes;
        let mut last: Option<&Run> = None;
        let mut is_first = true;
        while let Some(&hash) = rest.first() {
            let next = last.take().and_then(|run| self.next(run, hash));
            let Some(found) = next.or_else(|| self.find(&table, hash, Shape::len)) else {
                return;
            };
            let Found {
                run,
                shape,
                hashes,
                offset,
            } = found;
            let len = shape.len();
            let near = len.min(offset + NEAR);
            let mut count = hashes.common(offset, near, rest);
            if offset + count == near {
                self.expect(&table, run, rest.get(len - offset..).unwrap_or(&[]));
                count += hashes.common(near, len, &rest[count..]);
            }
            entries.clear();
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
            if is_first {
                *parting = count;
                is_first = false;
            }
            rest = &rest[count..];
            last = Some(run);
        }
    }

    /// Brings what the next steps read into the cache while this one goes on, for all of a match's time is waiting for
    /// memory: the hashes of the run behind `run`, and the head of the one behind that. `rest` starts behind `run`.
    #[inline]
    fn expect(&self, table: &Table, run: &Run, rest: &[u64]) {
        let Some(&hash) = rest.first() else { return };
        let Some(next) = run.next(hash).and_then(|id| self.run(id)) else {
            table.expect(&[hash]);
            return;
        };
        let shape = next.shape();
        self.expect_lines(shape);
        if let Some(behind) = rest.get(shape.len()).and_then(|&hash| next.next(hash)) {
            self.runs.expect(behind);
        }
    }

    /// Where a block lies, if in a run that the last one has in mind.
    #[inline]
    fn next(&self, last: &Run, hash: u64) -> Option<Found<'_>> {
        self.look(Place::new(last.next(hash)?, 0), hash, Shape::len)
    }

    /// Where a block lies, below an end that `end` takes from the run's shape.
    #[inline]
    fn find(&self, table: &Table, hash: u64, end: impl Fn(Shape) -> usize) -> Option<Found<'_>> {
        table.find(hash, |place| self.look(place, hash, &end))
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
            self.runs.expect(place.run());
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

    #[inline]
    fn expect_lines(&self, shape: Shape) {
        let first = shape.hashes();
        (first..first + shape.lines() as u32).for_each(|line| self.lines.expect(line));
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
