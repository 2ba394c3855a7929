//! The memory cap: what is forgotten at it, and the table's growth below it.
//!
//! With a cap, every run carries an age. A match gives the runs on its path falling ages, and a run
//! stored behind another one just below that one's; so the oldest run is always a leaf. Time moves on with
//! stores, not with matches, so that matches of the same prompt seldom write.

use std::sync::atomic::Ordering::Relaxed;

use crate::{
    blocks::{Blocks, Short},
    holders::Slot,
    run::Place,
    table::Table,
};

/// Between two moments; more than the runs a match can pass.
const TICK: u64 = 1 << 24;

/// Stores in a moment.
const TICK_STORES: u64 = 16;

/// When short of memory, one run in this many is forgotten at once: looking for the oldest takes
/// time in proportion to all.
const FORGET_SHARE: usize = 16;

impl Blocks {
    /// The age of what is matched now.
    pub(crate) fn now(&self) -> u64 {
        (self.counts.clock.load(Relaxed) / TICK_STORES + 1) * TICK
    }

    pub(crate) fn tick(&self) {
        self.counts.clock.fetch_add(1, Relaxed);
    }

    /// The age of a new run behind another one, or of a prompt's first.
    pub(crate) fn age_behind(&self, before: Option<Place>) -> u64 {
        before
            .and_then(|place| self.run(place.run()))
            .map_or_else(|| self.now(), |run| run.touched().saturating_sub(1))
    }

    /// Makes room for `count` more blocks, forgetting others where the cap demands it; false when even
    /// an empty index has none.
    pub(crate) fn make_room(&self, count: usize, short: Short) -> bool {
        match short {
            Short::Table(homes) if self.grow(homes, count) => true,
            _ => self.forget(),
        }
    }

    /// Counts blocks of one slot that could not be kept.
    pub(crate) fn note_forgotten(&self, slot: Slot, count: usize) {
        self.counts.forgotten.fetch_add(count as u64, Relaxed);
        self.tally_of(slot).lock().forgotten += count as u64;
    }

    /// Replaces the table of so many buckets by a larger one, if memory allows.
    fn grow(&self, homes: usize, count: usize) -> bool {
        let _alone = self.turns.write();
        let old = self.table.load();
        if old.homes() != homes {
            return true; // somebody else has
        }
        let least = Table::homes_for(self.counts.placed.load(Relaxed) + count).max(old.homes() + 1);
        // Half as large again; twice, should a bucket still overflow; an eighth near the cap.
        for homes in [old.homes() * 3 / 2, old.homes() * 2, old.homes() * 9 / 8] {
            let homes = homes.max(least);
            if self.budget.take(Table::bytes(homes)) {
                let Some(table) = self.refill(Table::new(homes)) else {
                    self.budget.give(Table::bytes(homes));
                    continue;
                };
                self.table.store(table);
                self.budget.give(Table::bytes(old.homes()));
                return true;
            }
        }
        false
    }

    /// Forgets the oldest runs, a [`FORGET_SHARE`]th of all; false when there are none.
    fn forget(&self) -> bool {
        let _turn = self.counts.forgetting.lock();
        let mut ages: Vec<(u64, u32)> = (1..self.runs.end())
            .filter_map(|id| Some((id, self.run(id)?)))
            .filter(|(_, run)| run.shape().len() > 0)
            .map(|(id, run)| (run.touched(), id))
            .collect();
        if ages.is_empty() {
            return false;
        }
        let count = ages.len().div_ceil(FORGET_SHARE);
        ages.select_nth_unstable(count - 1);
        ages[..count]
            .iter()
            .for_each(|&(_, id)| self.forget_run(id));
        true
    }
}
