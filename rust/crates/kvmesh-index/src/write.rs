//! How blocks come and go.

use std::sync::atomic::Ordering::Relaxed;

use kvmesh_core::BlockHash;

use crate::{
    blocks::{Blocks, Held, Short, Turn},
    cover::Share,
    holders::Slot,
    line::low_bits,
    lock::lock,
    run::{Hashes, Place, RUN_BLOCKS, Run, Shape, lines_for},
    sync::Arc,
    table::{Inserted, Table},
};

/// Blocks after which a writer's turn ends with the run it is at.
const TURN_BLOCKS: usize = 4 * RUN_BLOCKS;

impl Blocks {
    /// Calls `each` with the run in which a block lies, locked, and the block's place; `None` when
    /// it lies there no more.
    fn at<T>(
        &self,
        turn: &Turn<'_>,
        place: Place,
        hash: u64,
        each: impl FnOnce(Held<'_>, usize) -> T,
    ) -> Option<T> {
        let run = self.run(place.run())?;
        let _guard = lock(&run.cover.lock, turn.alone);
        let shape = run.shape();
        let hashes = Hashes::of(shape, &self.lines)?;
        let id = place.run();
        (place.offset() < shape.len() && hashes.get(place.offset()) == hash).then(|| {
            each(
                Held {
                    id,
                    run,
                    shape,
                    hashes,
                },
                place.offset(),
            )
        })
    }

    /// Adds blocks to a slot. `parent`, the block before the first, decides about layout only.
    /// One thread at a time stores into a slot, removes from it or clears it.
    pub fn store(&self, slot: Slot, hashes: &[u64], mut parent: Option<u64>) {
        if self.budget.max().is_some() {
            self.tick();
        }
        let mut rest = hashes;
        while !rest.is_empty() {
            let (done, short) = self.store_some(slot, rest, parent);
            if done > 0 {
                parent = Some(rest[done - 1]);
                rest = &rest[done..];
            }
            let least = rest.len().min(RUN_BLOCKS);
            if short.is_some_and(|short| !self.make_room(least, short)) {
                self.note_forgotten(slot, least);
                rest = &rest[least..];
            }
        }
    }

    /// Stores a turn's worth of the blocks, or as many as there is room for: how many, and what was short.
    fn store_some(
        &self,
        slot: Slot,
        hashes: &[u64],
        parent: Option<u64>,
    ) -> (usize, Option<Short>) {
        let turn = self.turn();
        let least = hashes.len().min(RUN_BLOCKS);
        if self.counts.placed.load(Relaxed) + least > turn.table.capacity() {
            return (0, Some(Short::Table(turn.table.homes())));
        }
        turn.table.expect(&hashes[..1]);
        let mut before = parent.and_then(|hash| Some((self.find_any(&turn.table, hash)?, hash)));
        let mut at = 0;
        while at < hashes.len().min(TURN_BLOCKS) {
            let rest = &hashes[at..];
            let stored = match self.find_any(&turn.table, rest[0]) {
                Some(place) => self
                    .at(&turn, place, rest[0], |held, offset| {
                        let count = held.hashes.common(offset, held.shape.len(), rest);
                        turn.table.expect(rest.get(count..=count).unwrap_or(&[]));
                        self.hold(&held, slot, low_bits(count) << offset)
                            .map(|()| (count, Place::new(held.id, offset + count - 1)))
                    })
                    .unwrap_or(Ok((0, place))), // it has just gone; look again
                None => self.append(&turn, before, slot, rest),
            };
            match stored {
                Ok((0, _)) => {}
                Ok((count, last)) => {
                    at += count;
                    before = Some((last, hashes[at - 1]));
                }
                Err(short) => return (at, Some(short)),
            }
        }
        (at, None)
    }

    /// Lays unknown blocks out behind `before`, where there is room in its run, else in a new one.
    /// How many it took, up to a known block or the run's end, and where the last one lies.
    fn append(
        &self,
        turn: &Turn<'_>,
        before: Option<(Place, u64)>,
        slot: Slot,
        hashes: &[u64],
    ) -> Result<(usize, Place), Short> {
        if let Some((place, hash)) = before {
            let appended = self.at(turn, place, hash, |held, offset| {
                let is_last = offset + 1 == held.shape.len() && offset + 1 < RUN_BLOCKS;
                is_last.then(|| self.fill(turn, held, slot, hashes))
            });
            if let Some(Some(result)) = appended {
                return result;
            }
        }
        let (id, _) = self.runs.alloc(1, 1, &self.budget).ok_or(Short::Memory)?;
        let run = self.run(id).ok_or(Short::Memory)?;
        let guard = lock(&run.cover.lock, turn.alone);
        if self.budget.max().is_some() {
            run.touch(self.age_behind(before.map(|(place, _)| place)));
        }
        let shape = run.shape();
        let hashes_of = Hashes::of(shape, &self.lines).ok_or(Short::Memory)?;
        let held = Held {
            id,
            run,
            shape,
            hashes: hashes_of,
        };
        let result = self.fill(turn, held, slot, hashes);
        if let Some(last) = before.and_then(|(place, _)| self.run(place.run())) {
            last.set_next(hashes[0], id);
        }
        self.counts.runs.fetch_add(1, Relaxed);
        if run.shape().len() == 0 {
            self.free(id, run);
        }
        drop(guard);
        result
    }

    /// Adds unknown blocks at a run's end.
    fn fill(
        &self,
        turn: &Turn<'_>,
        held: Held<'_>,
        slot: Slot,
        hashes: &[u64],
    ) -> Result<(usize, Place), Short> {
        let len = held.shape.len();
        let held = self.widen(held, (len + hashes.len()).min(RUN_BLOCKS));
        let room = (held.shape.capacity() - len).min(hashes.len());
        if room == 0 {
            return Err(Short::Memory);
        }
        let first = Place::new(held.id, len);
        held.hashes.set(len, &hashes[..room]);
        // Also where readers are not shown it yet.
        let is_here = |hash, place| self.look(place, hash, Shape::capacity).is_some();
        let table = &turn.table;
        let (count, inserted) =
            table.insert(&hashes[..room], &hashes[room..], first, turn.alone, is_here);
        if count == 0 && inserted == Inserted::Full {
            return Err(Short::Table(table.homes()));
        }
        let bits = low_bits(count) << len;
        let share = held.run.cover.share(slot, &self.lines);
        if !self.set(&held, &share, share.blocks | bits) {
            table.remove(&hashes[..count], &[], first, turn.alone);
            return Err(Short::Memory);
        }
        self.counts.placed.fetch_add(count, Relaxed);
        self.counts.distinct.fetch_add(count, Relaxed);
        self.tally_of(slot)
            .lock()
            .held
            .extend(hashes[..count].iter().copied().map(BlockHash));
        held.run.extend_to(held.run.shape().with_len(len + count));
        Ok((count, Place::new(held.id, (len + count).max(1) - 1)))
    }

    /// Gives a slot other blocks of a run; false when there is no memory for it.
    #[inline]
    fn set(&self, held: &Held<'_>, share: &Share, blocks: u64) -> bool {
        let end = || {
            let shape = held.run.shape();
            held.run
                .renew(shape.renewed(shape.hashes(), shape.lines(), shape.len()));
        };
        let cover = &held.run.cover;
        cover.set(share, blocks, &self.lines, &self.budget, end)
    }

    /// Gives a run room for `len` blocks, or for fewer where memory is short.
    fn widen<'a>(&'a self, held: Held<'a>, len: usize) -> Held<'a> {
        let (wanted, lines) = (lines_for(len), held.shape.lines());
        if wanted <= lines {
            return held;
        }
        match self.lines.alloc(wanted, lines + 1, &self.budget) {
            Some((first, count)) => self.relocate(held, first, count),
            None => held,
        }
    }

    /// Moves a run's hashes to other lines.
    fn relocate<'a>(&'a self, held: Held<'a>, first: u32, lines: usize) -> Held<'a> {
        let (old, len) = (held.shape, held.shape.len());
        let shape = old.renewed(first, lines, len);
        let Some(hashes) = Hashes::of(shape, &self.lines) else {
            return held;
        };
        let mut buffer = [0; RUN_BLOCKS];
        hashes.set(0, held.hashes.copy(len, &mut buffer));
        held.run.renew(shape);
        if old.lines() > 0 {
            self.lines.give(old.hashes(), old.lines());
        }
        Held {
            shape,
            hashes,
            ..held
        }
    }

    /// Adds known blocks to a slot.
    fn hold(&self, held: &Held<'_>, slot: Slot, bits: u64) -> Result<(), Short> {
        let share = held.run.cover.share(slot, &self.lines);
        let new = bits & !share.blocks;
        if new == 0 {
            return Ok(());
        }
        if !self.set(held, &share, share.blocks | new) {
            return Err(Short::Memory);
        }
        let revived = (new & !share.others).count_ones() as usize;
        if revived > 0 {
            self.counts.distinct.fetch_add(revived, Relaxed);
        }
        let mut buffer = [0; RUN_BLOCKS];
        let all = held.hashes.copy(held.shape.len(), &mut buffer);
        self.tally_of(slot).lock().held.extend(named(all, new));
        Ok(())
    }

    /// Takes blocks from a slot; those it does not hold are ignored.
    pub fn remove(&self, slot: Slot, hashes: &[u64]) {
        let mut rest = hashes;
        while !rest.is_empty() {
            let turn = self.turn();
            let mut done = 0;
            while done < rest.len().min(TURN_BLOCKS) {
                let rest = &rest[done..];
                let Some(place) = self.find_any(&turn.table, rest[0]) else {
                    done += 1;
                    continue;
                };
                let removed = self.at(&turn, place, rest[0], |held, offset| {
                    let mut buffer = [0; RUN_BLOCKS];
                    let all = held.hashes.copy(held.shape.len(), &mut buffer);
                    let (first, count) = stretch(all, offset, rest);
                    let bits = low_bits(count) << first;
                    self.release(&turn, held, all, slot, bits, &rest[count..]);
                    count
                });
                done += removed.unwrap_or(0); // it has just gone; look again
            }
            rest = &rest[done..];
        }
    }

    /// Takes all blocks from a slot, after which none of its blocks is missing. Visits every run, unless the slot
    /// has nothing.
    pub fn clear(&self, slot: Slot) {
        if self.held(slot).count > 0 {
            self.clear_runs(slot);
        }
        self.tally_of(slot).lock().forgotten = 0;
    }

    fn clear_runs(&self, slot: Slot) {
        for id in 1..self.runs.end() {
            let turn = self.turn();
            let Some(run) = self.run(id) else { continue };
            let share = loop {
                let shape = run.shape();
                let share = run.cover.share(slot, &self.lines);
                if run.still(shape) {
                    break share;
                }
            };
            if share.blocks == 0 {
                continue;
            }
            self.with_run(&turn, id, |held| {
                let mut buffer = [0; RUN_BLOCKS];
                let all = held.hashes.copy(held.shape.len(), &mut buffer);
                self.release(&turn, held, all, slot, low_bits(all.len()), &[]);
            });
        }
    }

    /// Calls `each` with a run, locked.
    fn with_run(&self, turn: &Turn<'_>, id: u32, each: impl FnOnce(Held<'_>)) {
        if let Some(run) = self.run(id) {
            let _guard = lock(&run.cover.lock, turn.alone);
            let shape = run.shape();
            if let Some(hashes) = Hashes::of(shape, &self.lines) {
                each(Held {
                    id,
                    run,
                    shape,
                    hashes,
                });
            }
        }
    }

    /// Calls `each` with every run's hashes and holders. Writers must be held off for a whole picture.
    pub fn for_each_run(&self, mut each: impl FnMut(&[u64], &[(Slot, u64)])) {
        let turn = self.turn();
        let (mut hashes, mut slots) = (Vec::new(), Vec::new());
        for id in 1..self.runs.end() {
            self.with_run(&turn, id, |held| {
                hashes.clear();
                hashes.extend((0..held.shape.len()).map(|at| held.hashes.get(at)));
                slots.clear();
                let mut add = |slot, mask| slots.extend((mask != 0).then_some((slot, mask)));
                held.run.cover.for_each(&self.lines, &mut add);
                if !hashes.is_empty() {
                    each(&hashes, &slots);
                }
            });
        }
    }

    /// The blocks of a slot, those of a run together and in its order. Visits every run.
    pub fn of(&self, slot: Slot) -> Vec<u64> {
        let mut blocks = Vec::with_capacity(self.held(slot).count as usize);
        self.for_each_run(|hashes, slots| {
            if let Some(&(_, mask)) = slots.iter().find(|(holder, _)| *holder == slot) {
                let held = hashes
                    .iter()
                    .enumerate()
                    .filter(|(at, _)| mask >> at & 1 == 1);
                blocks.extend(held.map(|(_, hash)| hash));
            }
        });
        blocks
    }

    /// Takes blocks from a slot, of `all` in the run, and from the run's end those that nobody holds any more. Asks ahead
    /// for what removing those that come `next` will read.
    fn release(
        &self,
        turn: &Turn<'_>,
        held: Held<'_>,
        all: &[u64],
        slot: Slot,
        bits: u64,
        next: &[u64],
    ) {
        let share = held.run.cover.share(slot, &self.lines);
        let mut gone = bits & share.blocks;
        if gone == 0 {
            return;
        }
        if !self.set(&held, &share, share.blocks & !gone) {
            // No memory to tell this slot from others with the same blocks.
            let rest = share.blocks & !gone;
            self.note_forgotten(slot, rest.count_ones() as usize);
            gone = share.blocks;
            self.set(&held, &share, 0);
        }
        self.expect_run(&turn.table, next);
        self.tally_of(slot).lock().held.reduce(named(all, gone));
        self.expect_hashes(&turn.table, next);
        let dead = gone & !share.others;
        if dead != 0 {
            self.counts
                .distinct
                .fetch_sub(dead.count_ones() as usize, Relaxed);
            self.shrink(turn, held, all, share.others | share.blocks & !gone, next);
        }
    }

    /// Drops the positions at a run's end that nobody holds, given those that somebody does.
    fn shrink(&self, turn: &Turn<'_>, held: Held<'_>, all: &[u64], live: u64, next: &[u64]) {
        let len = (u64::BITS - live.leading_zeros()) as usize;
        let gone = &all[len..];
        if !gone.is_empty() {
            let first = Place::new(held.id, len);
            turn.table.remove(gone, next, first, turn.alone);
        }
        self.counts.placed.fetch_sub(gone.len(), Relaxed);
        let Held { id, run, .. } = held;
        if len == 0 {
            self.free(id, run);
        } else if !gone.is_empty() {
            let shape = run.shape();
            let shape = shape.renewed(shape.hashes(), shape.lines(), len);
            run.renew(shape);
            let lines = lines_for(len);
            if lines * 2 <= shape.lines() {
                if let Some((first, _)) = self.lines.alloc(lines, lines, &self.budget) {
                    self.relocate(Held { shape, ..held }, first, lines);
                }
            }
        }
    }

    /// Gives back a run without blocks, which is locked.
    fn free(&self, id: u32, run: &Run) {
        let shape = run.shape();
        run.renew(shape.renewed(0, 0, 0));
        if shape.lines() > 0 {
            self.lines.give(shape.hashes(), shape.lines());
        }
        run.cover.reset(&self.lines);
        self.counts.runs.fetch_sub(1, Relaxed);
        self.runs.give(id, 1);
    }

    /// Forgets a run's blocks, whoever holds them; how many there were.
    pub(crate) fn forget_run(&self, id: u32) {
        let turn = self.turn();
        self.with_run(&turn, id, |held| {
            let mut buffer = [0; RUN_BLOCKS];
            let all = held.hashes.copy(held.shape.len(), &mut buffer);
            let mut live = 0u64;
            held.run.cover.for_each(&self.lines, |slot, mask| {
                live |= mask;
                let mut tally = self.tally_of(slot).lock();
                tally.held.reduce(named(all, mask));
                tally.forgotten += u64::from(mask.count_ones());
            });
            let live = live.count_ones() as usize;
            self.counts.distinct.fetch_sub(live, Relaxed);
            self.counts.forgotten.fetch_add(live as u64, Relaxed);
            if !all.is_empty() {
                self.shrink(&turn, held, all, 0, &[]);
            }
        });
    }

    /// Fills a new table with every block. The caller holds `growth` alone.
    pub(crate) fn refill(&self, table: Table) -> Option<Arc<Table>> {
        for id in 1..self.runs.end() {
            let Some(run) = self.run(id) else { continue };
            let shape = run.shape();
            let Some(hashes) = Hashes::of(shape, &self.lines) else {
                continue;
            };
            let mut buffer = [0; RUN_BLOCKS];
            let all = hashes.copy(shape.len(), &mut buffer);
            let (_, inserted) = table.insert(all, &[], Place::new(id, 0), true, |_, _| false);
            if inserted != Inserted::Yes {
                return None;
            }
        }
        Some(Arc::new(table))
    }
}

/// The blocks at some positions of a run.
fn named(all: &[u64], bits: u64) -> impl Iterator<Item = BlockHash> {
    let mut left = bits;
    let stretches = std::iter::from_fn(move || {
        let first = (left != 0).then(|| left.trailing_zeros())?;
        let count = (left >> first).trailing_ones();
        left &= !(low_bits(count as usize) << first);
        Some(&all[first as usize..][..count as usize])
    });
    stretches.flatten().copied().map(BlockHash)
}

/// The positions around `offset` that hold the first of `hashes` in their order or, as a tail that is
/// evicted block by block, in reverse: the first position and how many. `all` are the run's blocks.
fn stretch(all: &[u64], offset: usize, hashes: &[u64]) -> (usize, usize) {
    let equal = |&(one, other): &(&u64, &u64)| one == other;
    let count = all[offset..].iter().zip(hashes).take_while(equal).count();
    if count > 1 {
        return (offset, count);
    }
    let back = all[..=offset].iter().rev().zip(hashes);
    let back = back.take_while(equal).count();
    (offset + 1 - back, back)
}
