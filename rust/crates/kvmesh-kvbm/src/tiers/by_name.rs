//! Where a tier's blocks are: by namespace and digest, or by the first 64 bits of a digest, which is all that the prefix
//! index and its events know of a block.

use std::hash::Hasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use kvmesh_core::{BlockHash, Digest};
use rustc_hash::FxHasher;

use super::entry::Key;
use super::{NamespaceId, Slot};

/// A map from keys to slots. Both kinds of look-up take the same way, because a key's hash is made of its first bits.
#[derive(Debug, Default)]
pub(super) struct ByName(HashTable<(Key, Slot)>);

impl ByName {
    pub(super) fn get(&self, key: &Key) -> Option<Slot> {
        let found = self
            .0
            .find(hash_of(key.name().0), |(other, _)| other == key);
        found.map(|&(_, slot)| slot)
    }

    /// The whole digest of a block; of several with the same first bits, one.
    pub(super) fn digest(&self, namespace: NamespaceId, hash: BlockHash) -> Option<Digest> {
        let name = Key::name_of(namespace, hash);
        let is = |(key, _): &(Key, Slot)| key.0 == namespace && key.1.block_hash() == hash;
        self.0.find(hash_of(name.0), is).map(|(key, _)| key.1)
    }

    /// Puts a key that is not there, or moves it to another slot.
    pub(super) fn insert(&mut self, key: Key, slot: Slot) {
        let rehash = |(key, _): &(Key, Slot)| hash_of(key.name().0);
        let same = |(other, _): &(Key, Slot)| *other == key;
        match self.0.entry(hash_of(key.name().0), same, rehash) {
            Entry::Occupied(mut entry) => entry.get_mut().1 = slot,
            Entry::Vacant(entry) => drop(entry.insert((key, slot))),
        }
    }

    pub(super) fn remove(&mut self, key: &Key) {
        if let Ok(entry) = (self.0).find_entry(hash_of(key.name().0), |(other, _)| other == key) {
            entry.remove();
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, Slot)> {
        self.0.iter().map(|(key, slot)| (key, *slot))
    }
}

/// The table takes some high bits of a hash as tags: a name alone would do, but namespaces differ in low bits only.
fn hash_of(name: u64) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write_u64(name);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(first: u8, last: u8) -> Digest {
        let mut bytes = [first; 32];
        bytes[31] = last;
        Digest::new(bytes)
    }

    #[test]
    fn blocks_are_found_by_all_of_their_digest_and_by_its_beginning() {
        let mut index = ByName::default();
        let (one, other) = (NamespaceId(0), NamespaceId(1));
        for number in 0..100 {
            index.insert(Key(one, digest(number, 1)), Slot(number.into()));
            index.insert(Key(other, digest(number, 2)), Slot(1000));
        }
        index.insert(Key(other, digest(7, 2)), Slot(7000));
        assert_eq!(index.iter().count(), 200);
        assert_eq!(index.get(&Key(one, digest(7, 1))), Some(Slot(7)));
        assert_eq!(index.get(&Key(other, digest(7, 2))), Some(Slot(7000)));
        assert_eq!(index.get(&Key(one, digest(7, 2))), None);
        let hash = digest(7, 0).block_hash();
        assert_eq!(index.digest(one, hash), Some(digest(7, 1)));
        assert_eq!(index.digest(other, hash), Some(digest(7, 2)));
        index.remove(&Key(one, digest(7, 1)));
        assert_eq!(index.get(&Key(one, digest(7, 1))), None);
        assert_eq!(index.digest(one, hash), None);
        assert_eq!(index.digest(other, hash), Some(digest(7, 2)));
    }
}
