//! What is remembered of blocks that are not in the cache.

use rustc_hash::FxHashMap;

use crate::Key;

/// The blocks put here last. Two generations: when the younger one has its half of the room, the older one goes.
#[derive(Debug)]
pub struct Ghosts<T> {
    young: FxHashMap<Key, T>,
    old: FxHashMap<Key, T>,
}

impl<T> Default for Ghosts<T> {
    fn default() -> Self {
        Self {
            young: FxHashMap::default(),
            old: FxHashMap::default(),
        }
    }
}

impl<T> Ghosts<T> {
    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.young.is_empty() && self.old.is_empty()
    }

    /// Remembers a block, and of those before it as many as make `room` blocks in all, or up to half of it less.
    pub fn put(&mut self, key: Key, what: T, room: usize) {
        if self.young.len() * 2 >= room {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, what);
    }

    /// What is remembered of a block.
    pub fn get(&self, key: Key) -> Option<&T> {
        self.young.get(&key).or_else(|| self.old.get(&key))
    }

    /// What was remembered of a block, which is forgotten here.
    pub fn take(&mut self, key: Key) -> Option<T> {
        (self.young.remove(&key)).or_else(|| self.old.remove(&key))
    }
}
