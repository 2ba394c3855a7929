//! Blocks that come up from a tier below: reserved, readable when they have arrived, and leased by readers who wait.

use kvmesh_core::Digest;

use super::super::entry::{Key, State};
use super::super::{NamespaceId, Origins, Room, Slot};
use super::Catalog;
use crate::journal::Journal;

impl Catalog {
    /// Reserves room for blocks that are on their way up from a tier; `promoted` each.
    pub(crate) fn promote(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
        from: kvmesh_core::Tier,
    ) -> Vec<Room> {
        let state = State::Promoting { readers: 0 };
        let rooms = self.reserve_as(state, journal, namespace, parent, chain);
        for room in &rooms {
            if let Room::Reserved(slot) = room
                && let Some(block) = self.slabs.get_mut(*slot)
            {
                block.came_from = Some(from);
            }
        }
        rooms
    }

    /// Where leased blocks came from that are read for the first time since.
    pub(crate) fn take_origins(&mut self, slots: &[Slot]) -> Origins {
        let mut origins = Origins::default();
        for &slot in slots {
            match self
                .slabs
                .get_mut(slot)
                .and_then(|block| block.came_from.take())
            {
                Some(kvmesh_core::Tier::Nvme) => origins.nvme += 1,
                Some(kvmesh_core::Tier::Network) => origins.network += 1,
                _ => {}
            }
        }
        origins
    }

    /// The block will not come, but its slot may still be written: it is not to be found any more. `promoted` frees it.
    pub(crate) fn forsake(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get(slot) else {
            return;
        };
        if let State::Promoting { readers } = block.state {
            self.unlist(slot, false);
            // Whoever fills it counts as one more reader.
            self.doom(slot, readers + 1);
        }
    }

    /// The block has arrived whole, or will not come.
    pub(crate) fn promoted(&mut self, journal: &Journal, slot: Slot, whole: bool) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        let readers = match block.state {
            State::Promoting { readers } => readers,
            // Forsaken.
            State::Doomed { .. } => return self.release(slot),
            _ => return,
        };
        if whole {
            block.state = State::Registered { readers };
            self.stats.blocks_in_use -= u64::from(readers == 0);
            self.offer(slot);
            self.announce(journal, slot);
            return;
        }
        self.unlist(slot, false);
        if readers == 0 {
            self.stats.blocks_in_use -= 1;
            self.vacate(slot);
        } else {
            self.doom(slot, readers);
        }
    }

    /// Whether the slot's block is still on its way up.
    pub(crate) fn is_promoting(&self, slot: Slot) -> bool {
        (self.slabs.get(slot)).is_some_and(|block| matches!(block.state, State::Promoting { .. }))
    }

    /// Whether the block is here, without its being counted as asked for.
    pub(crate) fn holds(&self, namespace: NamespaceId, digest: &Digest) -> bool {
        let slot = self.index.get(&Key(namespace, *digest));
        slot.and_then(|slot| self.slabs.get(slot))
            .is_some_and(|block| matches!(block.state, State::Registered { .. }))
    }

    /// How many leading blocks of the chain are here, without their being counted as asked for.
    pub(crate) fn leading(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        (chain.iter())
            .take_while(|digest| self.readable(&Key(namespace, **digest)).is_some())
            .count()
    }
}
