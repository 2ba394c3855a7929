//! A cache of blocks without their bytes: what a policy would hold if it were in charge.

use crate::{BlockId, EvictionPolicy, Key, Link, Tick, Use, entry};

/// In 8 bytes: whether it is present, and the present blocks that follow it, are one number.
#[derive(Debug, Default, Clone)]
struct Block {
    state: u32,
    parent: Link,
}

/// Of a block's state.
const PRESENT: u32 = 1 << 31;

impl Block {
    fn is_present(&self) -> bool {
        self.state & PRESENT != 0
    }

    fn followers(&self) -> u32 {
        self.state & !PRESENT
    }
}

/// The present blocks of a cache and the policy that ranks them. Blocks are numbered by the caller.
pub struct PrefixCache {
    policy: Box<dyn EvictionPolicy>,
    blocks: Vec<Block>,
    capacity: usize,
    len: usize,
    /// The last operation one of whose blocks was refused: what hangs on that block is refused, too.
    refused: Tick,
    /// The block used last, if nothing follows it: offered only when the next one does not.
    tip: Option<BlockId>,
}

impl PrefixCache {
    /// An empty cache for `capacity` blocks.
    pub fn new(policy: Box<dyn EvictionPolicy>, capacity: usize) -> Self {
        Self {
            policy,
            blocks: Vec::new(),
            capacity,
            len: 0,
            refused: 0,
            tip: None,
        }
    }

    /// Whether the block is in the cache.
    pub fn holds(&self, block: BlockId) -> bool {
        self.blocks.get(block.at()).is_some_and(Block::is_present)
    }

    /// Blocks in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A chain's block is used: found, or stored if the policy wants it. Chains are used from their first block on, all
    /// blocks at one tick, which is above 0. Returns whether it was found. Blocks evicted for it are added to `evicted`.
    pub fn touch(
        &mut self,
        block: BlockId,
        parent: Option<BlockId>,
        at: &Use,
        evicted: &mut Vec<BlockId>,
    ) -> bool {
        let tip = self.tip.take();
        let known = entry(&mut self.blocks, block);
        let found = known.is_present();
        let follows_tip = tip.is_some() && tip == parent && !found;
        if !follows_tip && let Some(tip) = tip {
            self.policy.offer(tip);
        }
        if found {
            if known.followers() == 0 {
                self.policy.withdraw(block);
            }
            self.policy.used(block, at);
        } else {
            known.parent = parent.into();
            // First, so that room is not made by evicting the very block this one follows.
            if self.follow(block)
                && !follows_tip
                && let Some(parent) = parent
            {
                self.policy.withdraw(parent);
            }
            if !self.make_room(at, evicted) {
                self.refused = at.tick;
                self.unfollow(block);
                return false;
            }
            self.policy.used(block, at);
            self.blocks[block.at()].state |= PRESENT;
            self.len += 1;
        }
        self.tip = (self.blocks[block.at()].followers() == 0).then_some(block);
        found
    }

    /// What the policy says of a block's return.
    pub fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        self.policy.chance(block, key)
    }

    /// Drops a block, present or not.
    pub fn remove(&mut self, block: BlockId) {
        self.drop_block(block, false);
    }

    fn drop_block(&mut self, block: BlockId, for_room: bool) {
        if !self.holds(block) {
            return;
        }
        let known = &mut self.blocks[block.at()];
        known.state &= !PRESENT;
        if known.followers() == 0 {
            self.policy.withdraw(block);
            self.tip = self.tip.filter(|&tip| tip != block);
        }
        self.policy.removed(block, for_room);
        self.len -= 1;
        self.unfollow(block);
    }

    /// Holds at most so many blocks from now on; those evicted are added to `evicted`.
    pub fn resize(&mut self, capacity: usize, evicted: &mut Vec<BlockId>) {
        self.capacity = capacity;
        if let Some(tip) = self.tip.take() {
            self.policy.offer(tip);
        }
        while self.len > capacity && self.evict(evicted) {}
    }

    fn make_room(&mut self, at: &Use, evicted: &mut Vec<BlockId>) -> bool {
        if self.refused == at.tick {
            self.policy.admits(at);
            return false;
        }
        self.len < self.capacity || (self.policy.admits(at) && self.evict(evicted))
    }

    fn evict(&mut self, evicted: &mut Vec<BlockId>) -> bool {
        let victim = self.policy.victim();
        if let Some(victim) = victim {
            self.drop_block(victim, true);
            evicted.push(victim);
        }
        victim.is_some()
    }

    /// Whether the block is the first to follow a present one.
    fn follow(&mut self, block: BlockId) -> bool {
        let Some(parent) = self.blocks[block.at()].parent.get() else {
            return false;
        };
        let parent = entry(&mut self.blocks, parent);
        parent.state += 1;
        parent.state == PRESENT + 1
    }

    fn unfollow(&mut self, block: BlockId) {
        let Some(parent) = self.blocks[block.at()].parent.get() else {
            return;
        };
        let parent_block = &mut self.blocks[parent.at()];
        parent_block.state -= 1;
        if parent_block.state == PRESENT {
            self.policy.offer(parent);
        }
    }
}
