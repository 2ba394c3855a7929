//! Blocks that come up from a tier below: reserved, readable when they have arrived, and leased by readers who wait.

use kvmesh_core::Digest;

use super::super::entry::{Key, State};
use super::super::{NamespaceId, Room, Slot};
use super::Catalog;
use crate::journal::Journal;

impl Catalog {
    /// Reserves room for blocks that are on their way up; `promoted` each.
    pub(crate) fn promote(
        &mut self,
        journal: &Journal,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        let state = State::Promoting { readers: 0 };
        self.reserve_as(state, journal, namespace, parent, chain)
    }

    /// The block has arrived whole, or will not come.
    pub(crate) fn promoted(&mut self, journal: &Journal, slot: Slot, whole: bool) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        let State::Promoting { readers } = block.state else {
            return;
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
