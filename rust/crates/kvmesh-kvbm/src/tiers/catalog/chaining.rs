//! Which blocks may leave: those nobody reads and no other block follows.

use kvmesh_core::Digest;

use super::super::Slot;
use super::super::entry::{Block, Key};
use super::Catalog;
use crate::eviction::Use;

impl Catalog {
    /// Marks a block as used. It is not offered any more.
    pub(super) fn use_now(&mut self, slot: Slot, at: &Use) {
        let Some(block) = self.slabs.get_mut(slot) else {
            return;
        };
        block.used = at.tick;
        let (part, id) = (block.part, block.id);
        self.slabs.used(slot, at.tick);
        self.unpark(slot);
        self.parts[part.0].ranking.used(id, at);
    }

    pub(super) fn offer(&mut self, slot: Slot) {
        let Some(block) = self.slabs.get(slot) else {
            return;
        };
        if block.is_idle() && block.parked.is_none() && !self.followers.contains_key(&block.key) {
            self.parts[block.part.0].ranking.offer(block.id);
        }
    }

    pub(super) fn follow(&mut self, block: &Block) {
        self.follow_parent(block.key, block.parent);
    }

    pub(super) fn follow_parent(&mut self, key: Key, parent: Option<Digest>) {
        let Some(parent) = parent.map(|parent| Key(key.0, parent)) else {
            return;
        };
        *self.followers.entry(parent).or_default() += 1;
        let Some(slot) = self.index.get(&parent) else {
            return;
        };
        if let Some(block) = self.slabs.get(slot) {
            self.parts[block.part.0].ranking.withdraw(block.id);
            self.unpark(slot);
        }
    }

    pub(super) fn unfollow(&mut self, block: &Block) {
        self.unfollow_parent(block.key, block.parent);
    }

    pub(super) fn unfollow_parent(&mut self, key: Key, parent: Option<Digest>) {
        let Some(parent) = parent.map(|parent| Key(key.0, parent)) else {
            return;
        };
        if let Some(count) = self.followers.get_mut(&parent) {
            *count -= 1;
            if *count == 0 {
                self.followers.remove(&parent);
                if let Some(slot) = self.index.get(&parent) {
                    self.offer(slot);
                }
            }
        }
    }
}
