//! Blocks that leave next are chosen ahead, so that they can be written to the tier below before their room is needed.
//!
//! A parked block is found and read as before; to the policy it is still there but not offered, and to its chain it is
//! gone already, so that the block before it may be chosen next. Whoever uses it takes it back. Once it is written
//! below, or is not to be, it is done; done blocks leave first. Where none is done the writer is behind, and the next
//! victim leaves unwritten: the newest is shed, those being written stay.

use std::collections::VecDeque;

use kvmesh_core::Digest;

use super::super::entry::{Block, State};
use super::super::{NamespaceId, Slot};
use super::shares::Part;
use super::{Catalog, PartId};

/// One in so many slots of a slab is vacant or parked, where blocks are written below, and the most blocks.
const AHEAD: usize = 16;
const MOST_AHEAD: usize = 1024;

/// The parked blocks of one part.
#[derive(Debug, Default)]
pub(super) struct Parked {
    /// Done, in the order chosen; entries whose number is not their block's any more are void.
    done: VecDeque<(Slot, u64)>,
    /// Blocks parked now.
    live: usize,
    next: u64,
}

/// A block that leaves soon, leased for being written below.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leaving {
    pub(crate) slot: Slot,
    pub(crate) namespace: NamespaceId,
    pub(crate) digest: Digest,
    pub(crate) parent: Option<Digest>,
    /// That it is used again within a day, if the policy knows.
    pub(crate) chance: Option<f64>,
    number: u64,
}

impl Catalog {
    /// Chooses blocks that leave next, at most `limit`, until enough are chosen. `take_back` each.
    pub(crate) fn park(&mut self, limit: usize) -> Vec<Leaving> {
        let mut leaving = Vec::new();
        for part in (0..self.parts.len()).map(PartId) {
            while leaving.len() < limit && self.wants_parked(part) {
                let Some(slot) = self.parts[part.0].ranking.victim() else {
                    break;
                };
                leaving.extend(self.park_one(part, slot));
            }
        }
        leaving
    }

    /// From now on blocks are written below before they leave.
    pub(crate) fn enable_parking(&mut self) {
        self.parks = true;
    }

    /// Whether more blocks should be chosen.
    pub(crate) fn wants_any_parked(&self) -> bool {
        self.parks && (0..self.parts.len()).any(|part| self.wants_parked(PartId(part)))
    }

    /// Blocks that are short of those that should be vacant or done.
    pub(crate) fn unspilled(&self) -> u64 {
        let short = |part: usize| {
            let done = self.parts[part].parked.done.iter();
            let done = done.filter(|entry| !self.is_void(entry)).count();
            self.margin(PartId(part)).saturating_sub(done)
        };
        let parts = if self.parks { self.parts.len() } else { 0 };
        (0..parts).map(|part| short(part) as u64).sum()
    }

    /// Whether a block would now leave unwritten to make room in this namespace's slab, and need not a little later.
    pub(crate) fn is_behind(&mut self, namespace: NamespaceId) -> bool {
        let slab = self.slab_of(namespace);
        if !self.parks || self.slabs.room(slab).0 > 0 {
            return false;
        }
        let part = self.by_slab[slab.0].parts[0];
        match self.loser(part) {
            Some((slot, _)) => self.is_shed(slot),
            None => {
                let mut parts = self.by_slab[slab.0].parts.iter();
                parts.any(|part| self.parts[part.0].parked.live > 0)
            }
        }
    }

    /// The block is below, or is not to be written: it leaves when its room is needed.
    pub(crate) fn done(&mut self, leaving: &Leaving) {
        let entry = (leaving.slot, leaving.number);
        if !self.is_void(&entry)
            && let Some(part) = self.slabs.get(leaving.slot).map(|block| block.part)
        {
            self.parts[part.0].parked.done.push_back(entry);
        }
        self.release(leaving.slot);
    }

    /// All registered blocks, leased; `done` each.
    pub(crate) fn everything(&mut self) -> Vec<Leaving> {
        let slots: Vec<Slot> = self.index.iter().map(|(_, slot)| slot).collect();
        let mut all = Vec::with_capacity(slots.len());
        for slot in slots {
            if !self.hold(slot) {
                continue;
            }
            let Some(block) = self.slabs.get(slot) else {
                continue;
            };
            let (key, used, id) = (block.key, block.used, block.id);
            let leaving = Leaving {
                slot,
                namespace: key.0,
                digest: key.1,
                parent: block.parent,
                chance: None,
                number: 0,
            };
            all.push((used, id, leaving));
        }
        all.sort_unstable_by_key(|&(used, id, _)| (used, id));
        all.into_iter().map(|(.., leaving)| leaving).collect()
    }

    /// Which block of a part makes room.
    pub(super) fn next_to_leave(&mut self, part: PartId) -> Option<Slot> {
        while let Some(&entry) = self.parts[part.0].parked.done.front() {
            if !self.is_void(&entry) {
                let block = self.slabs.get(entry.0);
                if block.is_some_and(Block::is_idle) {
                    return Some(entry.0);
                }
                break;
            }
            self.parts[part.0].parked.done.pop_front();
        }
        self.parts[part.0].ranking.victim()
    }

    /// The block stays, as far as parking goes.
    pub(super) fn unpark(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        if block.parked.take().is_none() {
            return;
        }
        let (key, parent, part) = (block.key, block.parent, block.part);
        self.parts[part.0].parked.live -= 1;
        self.follow_parent(key, parent);
    }

    /// Whether a block that leaves now is not below for want of time.
    pub(super) fn is_shed(&self, slot: Slot) -> bool {
        let block = self.slabs.get(slot);
        self.parks && block.is_some_and(|block| block.parked.is_none())
    }

    /// The block leaves. As one that was parked it has left its chain before.
    pub(super) fn leave_parked(&mut self, slot: Slot) {
        if let Some(block) = self.slabs.get_mut(slot)
            && block.parked.take().is_some()
        {
            block.parent = None;
            let part = block.part;
            self.parts[part.0].parked.live -= 1;
        }
    }

    fn wants_parked(&self, part: PartId) -> bool {
        self.parts[part.0].parked.live < self.margin(part)
    }

    /// Blocks that should be parked, so many being vacant: of its slab's, as many as the part has of its blocks.
    fn margin(&self, part: PartId) -> usize {
        let Part { slab, taken, .. } = &self.parts[part.0];
        let (vacant, all) = self.slabs.room(*slab);
        let of_slab = (all / AHEAD).clamp(1, MOST_AHEAD).saturating_sub(vacant);
        match self.by_slab[slab.0].taken {
            all_taken if all_taken > *taken => (of_slab * taken).div_ceil(all_taken),
            _ => of_slab,
        }
    }

    fn is_void(&self, &(slot, number): &(Slot, u64)) -> bool {
        (self.slabs.get(slot)).is_none_or(|block| block.parked != Some(number))
    }

    fn park_one(&mut self, part: PartId, slot: Slot) -> Option<Leaving> {
        let parked = &mut self.parts[part.0].parked;
        parked.next += 1;
        let number = parked.next;
        let block = self.slabs.get_mut(slot)?;
        block.parked = Some(number);
        block.state = State::Registered { readers: 1 };
        let (key, parent, id) = (block.key, block.parent, block.id);
        self.stats.blocks_in_use += 1;
        let Part {
            ranking, parked, ..
        } = &mut self.parts[part.0];
        parked.live += 1;
        ranking.withdraw(id);
        let chance = ranking.chance(id, key.name());
        self.unfollow_parent(key, parent);
        Some(Leaving {
            slot,
            namespace: key.0,
            digest: key.1,
            parent,
            chance,
            number,
        })
    }
}
