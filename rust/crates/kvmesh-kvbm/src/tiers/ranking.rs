//! The blocks of one slab as its eviction policy sees them: by number.

use super::Slot;
use crate::eviction::{BlockId, EvictionPolicy, Key, Use};

/// A policy, and the slots of the blocks it knows.
pub(super) struct Ranking {
    policy: Box<dyn EvictionPolicy>,
    slots: Vec<Slot>,
    vacant: Vec<BlockId>,
}

impl Ranking {
    pub(super) fn new(policy: Box<dyn EvictionPolicy>) -> Self {
        Self {
            policy,
            slots: Vec::new(),
            vacant: Vec::new(),
        }
    }

    /// Whether a block there is no room for is worth the victim's. Of a block that is refused this is all it hears.
    pub(super) fn admits(&mut self, at: &Use) -> bool {
        self.policy.admits(at)
    }

    /// A new block; returns its number.
    pub(super) fn add(&mut self, slot: Slot, at: &Use) -> BlockId {
        let block = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(slot);
            BlockId(self.slots.len() as u32 - 1)
        });
        self.slots[block.0 as usize] = slot;
        self.policy.used(block, at);
        block
    }

    /// The block is used again; it is not offered any more.
    pub(super) fn used(&mut self, block: BlockId, at: &Use) {
        self.policy.withdraw(block);
        self.policy.used(block, at);
    }

    pub(super) fn offer(&mut self, block: BlockId) {
        self.policy.offer(block);
    }

    pub(super) fn withdraw(&mut self, block: BlockId) {
        self.policy.withdraw(block);
    }

    /// How likely the block is used again within a day, as far as the policy knows.
    pub(super) fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        self.policy.chance(block, key)
    }

    /// The block is gone, and its number free.
    pub(super) fn remove(&mut self, block: BlockId, for_room: bool) {
        self.policy.withdraw(block);
        self.policy.removed(block, for_room);
        self.vacant.push(block);
    }

    pub(super) fn victim(&mut self) -> Option<Slot> {
        let victim = self.policy.victim()?;
        Some(self.slots[victim.0 as usize])
    }
}
