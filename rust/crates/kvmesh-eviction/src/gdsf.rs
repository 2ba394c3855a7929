//! Greedy-Dual-Size-Frequency with equal sizes and costs: least frequently used first, with aging.
//!
//! L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs, 1998):
//! a block's priority is its uses plus the priority of the last victim at the time of its last use. Uses are remembered
//! past eviction, which does better on prefix chains than counting anew.

use std::collections::BTreeSet;

use crate::ghosts::Ghosts;
use crate::{BlockId, EvictionPolicy, Key, Tick, Use, entry};

/// Evicted blocks whose uses are remembered for each block in the cache, and at least.
const MEMORY: usize = 4;
const LEAST_MEMORY: usize = 16_384;

#[derive(Debug, Clone)]
struct Block {
    key: Key,
    uses: u32,
    priority: u64,
    used: Tick,
}

/// The policy. Memory: four words a block, one tree entry an offered block, and the remembered uses.
#[derive(Debug, Default)]
pub struct Gdsf {
    blocks: Vec<Option<Block>>,
    len: usize,
    offered: BTreeSet<(u64, Tick, BlockId)>,
    ghosts: Ghosts<u32>,
    /// The priority of the last victim.
    floor: u64,
}

impl Gdsf {
    fn rank(&self, block: BlockId) -> Option<(u64, Tick, BlockId)> {
        let known = self.blocks.get(block.at())?.as_ref()?;
        Some((known.priority, known.used, block))
    }
}

impl EvictionPolicy for Gdsf {
    fn used(&mut self, block: BlockId, at: &Use) {
        let known = entry(&mut self.blocks, block).get_or_insert_with(|| {
            self.len += 1;
            Block {
                key: at.key,
                uses: self.ghosts.take(at.key).unwrap_or(0),
                priority: 0,
                used: 0,
            }
        });
        known.uses = known.uses.saturating_add(1);
        known.priority = self.floor + u64::from(known.uses);
        known.used = at.tick;
    }

    fn admits(&mut self, _: &Use) -> bool {
        true
    }

    fn offer(&mut self, block: BlockId) {
        self.offered.extend(self.rank(block));
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some(rank) = self.rank(block) {
            self.offered.remove(&rank);
        }
    }

    fn removed(&mut self, block: BlockId, _: bool) {
        if let Some(known) = self.blocks[block.at()].take() {
            self.len -= 1;
            self.ghosts
                .put(known.key, known.uses, LEAST_MEMORY.max(MEMORY * self.len));
        }
    }

    fn victim(&mut self) -> Option<BlockId> {
        let &(priority, _, block) = self.offered.first()?;
        self.floor = self.floor.max(priority);
        Some(block)
    }
}
