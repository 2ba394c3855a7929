//! Greedy-Dual-Size-Frequency with equal sizes and costs: least frequently used first, with aging.
//!
//! L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs, 1998):
//! a block's priority is its uses plus the priority of the last victim at the time of its last use. Uses are remembered
//! past eviction, which does better on prefix chains than counting anew.

use std::collections::BTreeSet;
use std::num::NonZeroU32;

use crate::ghosts::Ghosts;
use crate::{BlockId, EvictionPolicy, Key, Tick, Use, entry};

/// Evicted blocks whose uses are remembered for each block in the cache, and at least.
const MEMORY: usize = 4;
const LEAST_MEMORY: usize = 16_384;

#[derive(Debug, Clone)]
struct Block {
    key: Key,
    /// Not zero, so that no block takes no more room than one.
    uses: NonZeroU32,
    priority: u64,
    used: Tick,
}

/// The policy. Memory: four words a block, one tree entry an offered block, and the remembered uses.
#[derive(Debug, Default)]
pub struct Gdsf {
    blocks: Vec<Option<Block>>,
    len: usize,
    offered: BTreeSet<(u64, Tick, BlockId)>,
    ghosts: Ghosts<NonZeroU32>,
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
        let place = entry(&mut self.blocks, block);
        let uses = match place {
            Some(known) => known.uses.saturating_add(1),
            None => {
                self.len += 1;
                let before = self.ghosts.take(at.key);
                before.map_or(NonZeroU32::MIN, |uses| uses.saturating_add(1))
            }
        };
        *place = Some(Block {
            key: at.key,
            uses,
            priority: self.floor + u64::from(uses.get()),
            used: at.tick,
        });
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
