//! Least recently used first.
//!
//! A chain is used as one, at one tick, and only its tail is offered: so chains leave in the order of their last use,
//! each from its tail.

use std::collections::BTreeSet;

use crate::{BlockId, EvictionPolicy, Tick, Use, entry};

/// The policy. Memory: one word a block, one tree entry an offered block.
#[derive(Debug, Default)]
pub struct Lru {
    used: Vec<Tick>,
    offered: BTreeSet<(Tick, BlockId)>,
}

impl EvictionPolicy for Lru {
    fn used(&mut self, block: BlockId, at: &Use) {
        *entry(&mut self.used, block) = at.tick;
    }

    fn admits(&mut self, _: &Use) -> bool {
        true
    }

    fn offer(&mut self, block: BlockId) {
        self.offered.insert((self.used[block.at()], block));
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some(&tick) = self.used.get(block.at()) {
            self.offered.remove(&(tick, block));
        }
    }

    fn removed(&mut self, _: BlockId, _: bool) {}

    fn victim(&mut self) -> Option<BlockId> {
        self.offered.first().map(|&(_, block)| block)
    }
}
