//! How blocks come and go.

use std::{hint::black_box, sync::atomic::Ordering::Relaxed};

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
        for piece in hashes.chunks(RUN_BLOCKS) {
            let mut rest = piece;
            while !rest.is_empty() {
                let (done, short) = self.store_some(slot, rest, parent);
                if done > 0 {
                    parent = Some(rest[done - 1]);
                    rest = &rest[done..];
                }
                if let Some(short) = short {
                    if !self.make_room(rest.len(), short) {
                        self.counts.forgotten.fetch_add(rest.len() as u64, Relaxed);
                        break;
                    }
                }
            }
        }
    }

    /// Stores as many of the blocks as there is room for: how many, and what was short.
    fn store_some(
        &self,
        slot: Slot,
        hashes: &[u64],
        parent: Option<u64>,
    ) -> (usize, Option<Short>) {
        let turn = self.turn();
        if self.counts.placed.load(Relaxed) + hashes.len() > turn.table.capacity() {
            return (0, Some(Short::Table(turn.table.homes())));
        }
        let mut before = parent.and_then(|hash| Some((self.find_any(&turn.table, hash)?, hash)));
        let mut at = 0;
        while at < hashes.len() {
            let rest = &hashes[at..];
            let stored = match self.find_any(&turn.table, rest[0]) {
                Some(place) => self
                    .at(&turn, place, rest[0], |held, offset| {
                        let count = held.hashes.common(offset, held.shape.len(), rest);
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
        black_box(
            hashes[..room]
                .iter()
                .fold(0, |all, &hash| all ^ turn.table.touch(hash)),
        );
        let mut count = 0;
        let mut inserted = Inserted::Yes;
        for &hash in &hashes[..room] {
            let place = Place::new(held.id, len + count);
            held.hashes.set(len + count, hash);
            // Also where readers are not shown it yet.
            let is_here = |place| self.look(place, hash, Shape::capacity).is_some();
            inserted = turn.table.insert(hash, place, turn.alone, is_here);
            if inserted != Inserted::Yes {
                break;
            }
            count += 1;
        }
        if count == 0 && inserted == Inserted::Full {
            return Err(Short::Table(turn.table.homes()));
        }
        let bits = low_bits(count) << len;
        let share = held.run.cover.share(slot, &self.lines);
        if !self.set(&held, &share, share.blocks | bits) {
            for (at, &hash) in hashes[..count].iter().enumerate() {
                let place = Place::new(held.id, len + at);
                turn.table.remove(hash, place, turn.alone);
            }
            return Err(Short::Memory);
        }
        self.counts.placed.fetch_add(count, Relaxed);
        self.counts.distinct.fetch_add(count, Relaxed);
        self.tally_of(slot)
            .lock()
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
        (0..len).for_each(|at| hashes.set(at, held.hashes.get(at)));
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
        self.tally_of(slot).lock().extend(held.named(new));
        Ok(())
    }

    /// Takes blocks from a slot; those it does not hold are ignored.
    pub fn remove(&self, slot: Slot, hashes: &[u64]) {
        for piece in hashes.chunks(RUN_BLOCKS) {
            let turn = self.turn();
            let mut at = 0;
            while at < piece.len() {
                let rest = &piece[at..];
                let Some(place) = self.find_any(&turn.table, rest[0]) else {
                    at += 1;
                    continue;
                };
                let removed = self.at(&turn, place, rest[0], |held, offset| {
                    let (first, count) = held.stretch(offset, rest);
                    self.release(&turn, held, slot, low_bits(count) << first);
                    count
                });
                at += removed.unwrap_or(0); // it has just gone; look again
            }
        }
    }

    /// Takes all blocks from a slot. Visits every run.
    pub fn clear(&self, slot: Slot) {
        if self.tally(slot).count == 0 {
            return;
        }
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
                let all = low_bits(held.shape.len());
                self.release(&turn, held, slot, all);
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
        let mut blocks = Vec::with_capacity(self.tally(slot).count as usize);
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

    /// Takes blocks from a slot, and from the run's end those that nobody holds any more.
    fn release(&self, turn: &Turn<'_>, held: Held<'_>, slot: Slot, bits: u64) {
        let share = held.run.cover.share(slot, &self.lines);
        let mut gone = bits & share.blocks;
        if gone == 0 {
            return;
        }
        if !self.set(&held, &share, share.blocks & !gone) {
            // No memory to tell this slot from others with the same blocks.
            let rest = share.blocks & !gone;
            self.counts
                .forgotten
                .fetch_add(rest.count_ones().into(), Relaxed);
            gone = share.blocks;
            self.set(&held, &share, 0);
        }
        self.tally_of(slot).lock().reduce(held.named(gone));
        let dead = gone & !share.others;
        if dead != 0 {
            self.counts
                .distinct
                .fetch_sub(dead.count_ones() as usize, Relaxed);
            self.shrink(turn, held, share.others | share.blocks & !gone);
        }
    }

    /// Drops the positions at a run's end that nobody holds, given those that somebody does.
    fn shrink(&self, turn: &Turn<'_>, held: Held<'_>, live: u64) {
        let len = (u64::BITS - live.leading_zeros()) as usize;
        let gone = len..held.shape.len();
        black_box(
            gone.clone()
                .fold(0, |all, at| all ^ turn.table.touch(held.hashes.get(at))),
        );
        for at in gone.clone() {
            turn.table
                .remove(held.hashes.get(at), Place::new(held.id, at), turn.alone);
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
            let mut live = 0u64;
            held.run.cover.for_each(&self.lines, |slot, mask| {
                live |= mask;
                let mut tally = self.tally_of(slot).lock();
                tally.reduce(held.named(mask));
            });
            let live = live.count_ones() as usize;
            self.counts.distinct.fetch_sub(live, Relaxed);
            self.counts.forgotten.fetch_add(live as u64, Relaxed);
            if held.shape.len() > 0 {
                self.shrink(&turn, held, 0);
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
            for at in 0..shape.len() {
                if table.insert(hashes.get(at), Place::new(id, at), true, |_| false)
                    != Inserted::Yes
                {
                    return None;
                }
            }
        }
        Some(Arc::new(table))
    }
}

impl Held<'_> {
    /// The hashes at some positions.
    fn named(&self, mut bits: u64) -> impl Iterator<Item = BlockHash> {
        std::iter::from_fn(move || {
            let at = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
            bits &= bits - 1;
            Some(BlockHash(self.hashes.get(at)))
        })
    }

    /// The positions around `offset` that hold the first of `hashes` in their order or, as a tail that is
    /// evicted block by block, in reverse: the first position and how many.
    fn stretch(&self, offset: usize, hashes: &[u64]) -> (usize, usize) {
        let count = self.hashes.common(offset, self.shape.len(), hashes);
        if count > 1 {
            return (offset, count);
        }
        let back = (0..=offset)
            .rev()
            .zip(hashes)
            .take_while(|&(at, &hash)| self.hashes.get(at) == hash)
            .count();
        (offset + 1 - back, back)
    }
}
