//! Blocks that leave next are chosen ahead, so that they can be written to the tier below before their room is needed.
//!
//! A parked block is found and read as before; to the policy it is still there but not offered, and to its chain it is
//! gone already, so that the block before it may be chosen next. Whoever uses it takes it back. Once it is written
//! below, or is not to be, it is done; done blocks leave first. Where none is done the writer is behind, and the next
//! victim leaves unwritten: the newest is shed, those being written stay.

use std::collections::VecDeque;

use kvmesh_core::Digest;

use super::super::entry::State;
use super::super::slabs::SlabId;
use super::super::{NamespaceId, Slot};
use super::Catalog;

/// The part of a slab that is vacant or parked, where blocks are written below, and the most blocks.
const AHEAD: usize = 16;
const MOST_AHEAD: usize = 1024;

/// The parked blocks of one slab.
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
        for slab in (0..self.slabs.len()).map(SlabId) {
            while leaving.len() < limit && self.wants_parked(slab) {
                let Some(slot) = self.rankings[slab.0].victim() else {
                    break;
                };
                leaving.extend(self.park_one(slab, slot));
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
        self.parks && (0..self.slabs.len()).any(|slab| self.wants_parked(SlabId(slab)))
    }

    /// Blocks that are short of those that should be vacant or done.
    pub(crate) fn unspilled(&self) -> u64 {
        let short = |slab: usize| {
            let done = self.parked[slab].done.iter();
            let done = done.filter(|entry| !self.is_void(entry)).count();
            self.margin(SlabId(slab)).saturating_sub(done)
        };
        let slabs = if self.parks { self.slabs.len() } else { 0 };
        (0..slabs).map(|slab| short(slab) as u64).sum()
    }

    /// Whether a block would now leave unwritten to make room in this namespace's slab, and need not a little later.
    pub(crate) fn is_behind(&mut self, namespace: NamespaceId) -> bool {
        let slab = self.slab_of(namespace);
        if !self.parks || self.slabs.room(slab).0 > 0 {
            return false;
        }
        let next = self.next_to_leave(slab);
        next.map_or(self.parked[slab.0].live > 0, |slot| self.is_shed(slot))
    }

    /// The block is below, or is not to be written: it leaves when its room is needed.
    pub(crate) fn done(&mut self, leaving: &Leaving) {
        let entry = (leaving.slot, leaving.number);
        if !self.is_void(&entry) {
            let slab = self.slab_of(leaving.namespace);
            self.parked[slab.0].done.push_back(entry);
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

    /// Which block makes room.
    pub(super) fn next_to_leave(&mut self, slab: SlabId) -> Option<Slot> {
        while let Some(&entry) = self.parked[slab.0].done.front() {
            if !self.is_void(&entry) {
                let block = self.slabs.get(entry.0);
                let idle =
                    block.is_some_and(|block| block.state == State::Registered { readers: 0 });
                if idle {
                    return Some(entry.0);
                }
                break;
            }
            self.parked[slab.0].done.pop_front();
        }
        self.rankings[slab.0].victim()
    }

    /// The block stays, as far as parking goes.
    pub(super) fn unpark(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        if block.parked.take().is_none() {
            return;
        }
        let (key, parent) = (block.key, block.parent);
        let slab = self.slab_of(key.0);
        self.parked[slab.0].live -= 1;
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
            let namespace = block.key.0;
            let slab = self.slab_of(namespace);
            self.parked[slab.0].live -= 1;
        }
    }

    fn wants_parked(&self, slab: SlabId) -> bool {
        self.parked[slab.0].live < self.margin(slab)
    }

    /// Blocks that should be parked, so many being vacant.
    fn margin(&self, slab: SlabId) -> usize {
        let (vacant, all) = self.slabs.room(slab);
        (all / AHEAD).clamp(1, MOST_AHEAD).saturating_sub(vacant)
    }

    fn is_void(&self, &(slot, number): &(Slot, u64)) -> bool {
        (self.slabs.get(slot)).is_none_or(|block| block.parked != Some(number))
    }

    fn park_one(&mut self, slab: SlabId, slot: Slot) -> Option<Leaving> {
        let parked = &mut self.parked[slab.0];
        parked.next += 1;
        let number = parked.next;
        let block = self.slabs.get_mut(slot)?;
        block.parked = Some(number);
        block.state = State::Registered { readers: 1 };
        let (key, parent, id) = (block.key, block.parent, block.id);
        self.parked[slab.0].live += 1;
        self.stats.blocks_in_use += 1;
        self.rankings[slab.0].withdraw(id);
        let chance = self.rankings[slab.0].chance(id, key.name());
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
