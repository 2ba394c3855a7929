//! An engine's pool of KV blocks and the prefixes they hold.
//!
//! A block is referenced by requests, or idle and cached, or free. Requests give their blocks back tail
//! first, so that the least recently used idle block never has a cached child.

use rustc_hash::FxHashMap;

const NONE: u32 = u32::MAX;

/// A block's place in the pool.
pub type BlockId = u32;

#[derive(Clone, Copy)]
struct Block {
    /// Its name in the index; 0 while it has none.
    hash: u64,
    references: u32,
    older: u32,
    newer: u32,
}

/// The pool of one engine.
pub struct Cache {
    capacity: u32,
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    named: FxHashMap<u64, BlockId>,
    oldest: u32,
    newest: u32,
    idle: u32,
}

impl Cache {
    /// An empty pool of `capacity` blocks.
    pub fn new(capacity: u32) -> Self {
        Self {
            capacity,
            blocks: Vec::new(),
            free: Vec::new(),
            named: FxHashMap::default(),
            oldest: NONE,
            newest: NONE,
            idle: 0,
        }
    }

    /// Blocks that requests reference.
    pub fn used(&self) -> u32 {
        self.blocks.len() as u32 - self.free.len() as u32 - self.idle
    }

    /// Blocks that are free or can be evicted.
    pub fn available(&self) -> u32 {
        self.capacity - self.used()
    }

    /// Leading blocks of `chain` that are cached.
    pub fn matched(&self, chain: &[u64]) -> usize {
        chain
            .iter()
            .take_while(|hash| self.named.contains_key(hash))
            .count()
    }

    /// References a cached block.
    pub fn acquire(&mut self, hash: u64) -> Option<BlockId> {
        let id = *self.named.get(&hash)?;
        if self.blocks[id as usize].references == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].references += 1;
        Some(id)
    }

    /// A referenced block without content; evicts the oldest idle one if none is free, and adds its name
    /// to `evicted`. None when every block is referenced.
    pub fn allocate(&mut self, evicted: &mut Vec<u64>) -> Option<BlockId> {
        let id = if let Some(id) = self.free.pop() {
            id
        } else if (self.blocks.len() as u32) < self.capacity {
            self.blocks.push(Block {
                hash: 0,
                references: 0,
                older: NONE,
                newer: NONE,
            });
            self.blocks.len() as u32 - 1
        } else if self.oldest != NONE {
            let id = self.oldest;
            self.unlink(id);
            let hash = std::mem::take(&mut self.blocks[id as usize].hash);
            if hash != 0 {
                self.named.remove(&hash);
                evicted.push(hash);
            }
            id
        } else {
            return None;
        };
        self.blocks[id as usize].references = 1;
        Some(id)
    }

    /// Names a block's content; false when another block has that name already.
    pub fn name(&mut self, id: BlockId, hash: u64) -> bool {
        if self.named.contains_key(&hash) {
            return false;
        }
        self.named.insert(hash, id);
        self.blocks[id as usize].hash = hash;
        true
    }

    /// Gives a reference back. Unreferenced, a block stays cached if it has a name or holds a full block of
    /// output (`keep`); else it is free.
    pub fn release(&mut self, id: BlockId, keep: bool) {
        let block = &mut self.blocks[id as usize];
        block.references -= 1;
        if block.references > 0 {
            return;
        }
        if block.hash == 0 && !keep {
            self.free.push(id);
            return;
        }
        block.older = self.newest;
        block.newer = NONE;
        match self.newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].newer = id,
        }
        self.newest = id;
        self.idle += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { older, newer, .. } = self.blocks[id as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.idle -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_the_tail_of_the_oldest_chain_first() {
        let mut cache = Cache::new(4);
        let mut gone = Vec::new();
        for chain in [[1, 2], [3, 4]] {
            let ids: Vec<_> = chain
                .iter()
                .map(|&hash| {
                    let id = cache.allocate(&mut gone).unwrap();
                    assert!(cache.name(id, hash));
                    id
                })
                .collect();
            ids.iter().rev().for_each(|&id| cache.release(id, false));
        }
        assert_eq!((cache.used(), cache.available()), (0, 4));
        let again = cache.acquire(1).unwrap();
        assert_eq!(cache.used(), 1);
        assert!(cache.allocate(&mut gone).is_some());
        assert_eq!(gone, [2]);
        assert!(cache.allocate(&mut gone).is_some());
        assert!(cache.allocate(&mut gone).is_some());
        assert_eq!(gone, [2, 4, 3]);
        assert_eq!(cache.allocate(&mut gone), None);
        assert_eq!(cache.matched(&[1, 2]), 1);
        cache.release(again, false);
        assert_eq!(cache.available(), 1);
    }
}
