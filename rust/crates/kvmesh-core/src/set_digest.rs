//! A digest of a set of blocks that does not depend on the order in which it was built.

use crate::BlockHash;

/// Number of blocks in a set, and the sum of a 128-bit mix of each. Two holders of equal sets have
/// equal digests; unequal sets collide with a chance of about 2^-128. Not a defence against
/// somebody who chooses the hashes.
///
/// The mix goes over the wire, so it never changes: the finalizer of SplitMix64 (Steele, Lea and
/// Flood, 2014) over the hash for the low half, and over the hash plus the golden ratio for the high half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SetDigest {
    /// Blocks in the set.
    pub count: u64,
    /// Sum of the blocks' mixes, modulo 2^128.
    pub sum: u128,
}

impl SetDigest {
    /// Adds a block that was not in the set.
    pub fn insert(&mut self, hash: BlockHash) {
        self.count += 1;
        self.sum = self.sum.wrapping_add(mix(hash.0));
    }

    /// Takes out a block that was in the set.
    pub fn remove(&mut self, hash: BlockHash) {
        self.count -= 1;
        self.sum = self.sum.wrapping_sub(mix(hash.0));
    }

    /// Adds blocks that were not in the set.
    pub fn extend(&mut self, hashes: impl IntoIterator<Item = BlockHash>) {
        let mut all = *self;
        hashes.into_iter().for_each(|hash| all.insert(hash));
        *self = all;
    }

    /// Takes out blocks that were in the set.
    pub fn reduce(&mut self, hashes: impl IntoIterator<Item = BlockHash>) {
        let mut all = *self;
        hashes.into_iter().for_each(|hash| all.remove(hash));
        *self = all;
    }
}

fn mix(hash: u64) -> u128 {
    let high = finalize(hash.wrapping_add(0x9e37_79b9_7f4a_7c15));
    u128::from(high) << 64 | u128::from(finalize(hash))
}

fn finalize(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_matter_and_removal_undoes() {
        let mut forth = SetDigest::default();
        let mut back = SetDigest::default();
        (0..100).for_each(|hash| forth.insert(BlockHash(hash)));
        (0..100).rev().for_each(|hash| back.insert(BlockHash(hash)));
        assert_eq!(forth, back);
        back.insert(BlockHash(7_000));
        assert_ne!(forth, back);
        back.remove(BlockHash(7_000));
        assert_eq!(forth, back);
        (0..100).for_each(|hash| forth.remove(BlockHash(hash)));
        assert_eq!(forth, SetDigest::default());
    }
}
