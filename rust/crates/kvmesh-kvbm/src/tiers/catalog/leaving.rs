//! Blocks that leave: for others' room, because they are wrong, or because somebody asks.

use kvmesh_core::Digest;

use super::super::entry::{Block, Key, State};
use super::super::{NamespaceId, Room, Slot};
use super::{Catalog, Event, PartId};
use crate::eviction::Use;
use crate::journal::Journal;

impl Catalog {
    pub(crate) fn discard(&mut self, journal: &Journal, slot: Slot) {
        if let Some(Block {
            state: State::Registered { readers: 1.. },
            ..
        }) = self.slabs.get(slot)
        {
            self.stats.corrupt += 1;
            self.forget(journal, slot, false);
        }
    }

    pub(crate) fn evict(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        blocks: &[Digest],
    ) -> usize {
        let slots: Vec<Slot> = blocks
            .iter()
            .filter_map(|digest| self.readable(&Key(namespace, *digest)))
            .collect();
        slots
            .into_iter()
            .filter(|&slot| self.drop_idle(journal, slot))
            .count()
    }

    pub(crate) fn flush(&mut self, journal: &Journal) -> usize {
        let slots: Vec<Slot> = self.index.iter().map(|(_, slot)| slot).collect();
        slots
            .into_iter()
            .filter(|&slot| self.drop_idle(journal, slot))
            .count()
    }

    pub(super) fn make_room(&mut self, journal: &Journal, part: PartId, at: &Use) {
        let slab = self.parts[part.0].slab;
        let loser = self.loser(part);
        let before = self.region_before(part, loser.map(|(slot, _)| slot));
        // Another layout's region that is colder than anything here. This may part a chain whose blocks lie in several
        // regions; what is left of it ages out.
        let region =
            (self.slabs).coldest_region(slab, before, |blocks| self.may_take(part, blocks));
        if let Some(region) = region {
            self.stats.evicted.layout += region.len() as u64;
            for victim in region {
                self.forget(journal, victim, false);
            }
            return;
        }
        let own = loser.is_none_or(|(_, own)| own);
        // What comes of another tenant's room is the newcomer's by right, whatever its own blocks are worth.
        if (!own || self.parts[part.0].ranking.admits(at))
            && let Some((slot, _)) = loser
        {
            self.stats.evicted.room += 1;
            self.stats.shed += u64::from(self.is_shed(slot));
            self.forget(journal, slot, true);
        }
    }

    /// Reserves for blocks that have to be kept: where they are worth less than what may leave, that leaves all the same.
    pub(crate) fn reserve_anyway(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        loop {
            let rooms = self.reserve(journal, namespace, parent, chain);
            let part = self.part_for(namespace, parent, chain);
            let victim = match rooms.last() {
                Some(Room::Full) => self.next_to_leave(part),
                _ => None,
            };
            let Some(slot) = victim else {
                return rooms;
            };
            for room in &rooms {
                if let Room::Reserved(slot) = room {
                    self.abandon(*slot);
                }
            }
            self.stats.evicted.room += 1;
            self.forget(journal, slot, true);
        }
    }

    fn drop_idle(&mut self, journal: &Journal, slot: Slot) -> bool {
        let idle = self.slabs.get(slot).is_some_and(Block::is_idle);
        if idle {
            self.stats.evicted.asked += 1;
            self.forget(journal, slot, false);
        }
        idle
    }

    /// Takes a registered block out of the index; its slot is free now, or after its last reader.
    pub(crate) fn forget(&mut self, journal: &Journal, slot: Slot, for_room: bool) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        let State::Registered { readers } = block.state else {
            return;
        };
        let (key, parent, part) = (block.key, block.parent, block.part);
        self.unlist(slot, for_room);
        self.remember_tenant(&key, part);
        self.stats.blocks -= 1;
        if let Some(events) = &mut self.events {
            events.push(Event::removed(slot, &key, parent));
        }
        if self.is_announced(key.0) {
            journal.removed(key.1.block_hash());
        }
        if readers == 0 {
            self.vacate(slot);
        } else {
            self.doom(slot, readers);
        }
    }

    /// The block is not to be found any more, but is still being read.
    pub(super) fn doom(&mut self, slot: Slot, readers: u32) {
        if let Some(block) = self.slabs.get_mut(slot) {
            block.state = State::Doomed { readers };
            let parent = block.parent.take();
            let gone = Block { parent, ..*block };
            self.unfollow(&gone);
        }
    }

    /// The block is not to be found any more.
    pub(super) fn unlist(&mut self, slot: Slot, for_room: bool) {
        self.leave_parked(slot);
        if let Some(block) = self.slabs.get(slot) {
            self.index.remove(&block.key);
            let (part, id) = (block.part, block.id);
            self.parts[part.0].ranking.remove(id, for_room);
        }
    }

    pub(super) fn vacate(&mut self, slot: Slot) {
        if let Some(block) = self.free(slot) {
            self.unfollow(&block);
        }
    }

    /// The slot is vacant.
    pub(super) fn free(&mut self, slot: Slot) -> Option<Block> {
        let block = self.slabs.remove(slot)?;
        self.count(block.part, false);
        Some(block)
    }
}
