//! S3-FIFO: three queues, of which a small one keeps one-use blocks from the rest.
//!
//! J. Yang et al., "FIFO Queues are All You Need for Cache Eviction" (SOSP 2023). Newcomers enter the small queue, a
//! tenth of the cache, those that were evicted lately the main one; used blocks of the small queue move to the main
//! one, those of the main one go round. Here a queue yields its oldest block that is offered, not its oldest.

use std::collections::BTreeSet;

use crate::ghosts::Ghosts;
use crate::{BlockId, EvictionPolicy, Key, Use, entry};

const MAX_USES: u8 = 3;
/// Blocks of the cache for one of the small queue.
const SMALL: usize = 10;

#[derive(Debug, Clone)]
struct Block {
    key: Key,
    in_main: bool,
    /// Uses since it was stored or went round, at most [`MAX_USES`].
    uses: u8,
    /// Its place in its queue.
    order: u64,
}

/// The policy. Memory: one entry a block, one tree entry an offered block, and the
/// remembered blocks.
#[derive(Debug, Default)]
pub struct S3Fifo {
    blocks: Vec<Option<Block>>,
    len: usize,
    small: usize,
    offered_small: BTreeSet<(u64, BlockId)>,
    offered_main: BTreeSet<(u64, BlockId)>,
    /// Blocks evicted from the small queue, by when.
    ghosts: Ghosts<u64>,
    evictions: u64,
    clock: u64,
}

impl S3Fifo {
    fn next(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn queue(&mut self, in_main: bool) -> &mut BTreeSet<(u64, BlockId)> {
        if in_main {
            &mut self.offered_main
        } else {
            &mut self.offered_small
        }
    }

    fn place(&self, block: BlockId) -> Option<(bool, (u64, BlockId))> {
        let known = self.blocks.get(block.at())?.as_ref()?;
        Some((known.in_main, (known.order, block)))
    }
}

impl EvictionPolicy for S3Fifo {
    fn used(&mut self, block: BlockId, at: &Use) {
        if let Some(known) = entry(&mut self.blocks, block) {
            known.uses = MAX_USES.min(known.uses + 1);
            return;
        }
        // As many are remembered as there are blocks.
        let in_main = (self.ghosts.take(at.key))
            .is_some_and(|evicted| evicted + self.len as u64 >= self.evictions);
        let order = self.next();
        self.blocks[block.at()] = Some(Block {
            key: at.key,
            in_main,
            uses: 0,
            order,
        });
        self.len += 1;
        self.small += usize::from(!in_main);
    }

    fn admits(&mut self, _: &Use) -> bool {
        true
    }

    fn offer(&mut self, block: BlockId) {
        if let Some((in_main, place)) = self.place(block) {
            self.queue(in_main).insert(place);
        }
    }

    fn withdraw(&mut self, block: BlockId) {
        if let Some((in_main, place)) = self.place(block) {
            self.queue(in_main).remove(&place);
        }
    }

    fn removed(&mut self, block: BlockId, _: bool) {
        let Some(known) = self.blocks[block.at()].take() else {
            return;
        };
        if !known.in_main {
            self.small -= 1;
            self.evictions += 1;
            self.ghosts.put(known.key, self.evictions, 2 * self.len);
        }
        self.len -= 1;
    }

    fn victim(&mut self) -> Option<BlockId> {
        loop {
            let from_small = self.offered_main.is_empty()
                || (self.small * SMALL >= self.len && !self.offered_small.is_empty());
            let &(order, block) = self.queue(!from_small).first()?;
            let next = self.next();
            let known = self.blocks[block.at()].as_mut()?;
            if from_small && known.uses > 1 {
                known.in_main = true;
                known.uses = 0;
                self.small -= 1;
            } else if !from_small && known.uses > 0 {
                known.uses -= 1;
            } else {
                return Some(block);
            }
            known.order = next;
            self.queue(!from_small).remove(&(order, block));
            self.queue(true).insert((next, block));
        }
    }
}
