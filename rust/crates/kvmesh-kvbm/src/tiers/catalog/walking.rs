//! All blocks of a tier one after the other, for whoever checks them: what is looked at this way has not been used.

use kvmesh_core::{BlockHash, Digest};

use super::super::entry::{Key, State};
use super::super::{Held, NamespaceId, Slot};
use super::Catalog;

impl Catalog {
    /// Leases registered blocks that lie behind `after`, in the order of their slots; `release` each.
    pub(crate) fn walk(&mut self, after: Option<Slot>, limit: usize) -> Vec<Held> {
        let there = |state| matches!(state, State::Registered { .. });
        let held: Vec<Held> = (self.slabs.behind(after))
            .filter(|(_, block)| there(block.state))
            .map(|(slot, block)| Held {
                slot,
                namespace: block.key.0,
                digest: block.key.1,
            })
            .take(limit)
            .collect();
        for block in &held {
            self.hold(block.slot);
        }
        held
    }

    /// Leases a registered block without its being used; the slot, if it is there.
    pub(crate) fn hold_block(&mut self, namespace: NamespaceId, digest: &Digest) -> Option<Slot> {
        let slot = self.index.get(&Key(namespace, *digest))?;
        self.hold(slot).then_some(slot)
    }

    /// The digests of a chain of which only hashes are known; ends at the first block that is not there.
    pub(crate) fn digests(&self, namespace: NamespaceId, hashes: &[BlockHash]) -> Vec<Digest> {
        (hashes.iter())
            .map_while(|&hash| self.index.digest(namespace, hash))
            .collect()
    }

    /// Leases a registered block without its being used; whether it is one.
    pub(super) fn hold(&mut self, slot: Slot) -> bool {
        let Some(block) = self.slabs.get_mut(slot) else {
            return false;
        };
        let State::Registered { readers } = &mut block.state else {
            return false;
        };
        self.stats.blocks_in_use += u64::from(*readers == 0);
        *readers += 1;
        let (part, id, parked) = (block.part, block.id, block.parked);
        if parked.is_none() {
            self.parts[part.0].ranking.withdraw(id);
        }
        true
    }
}
