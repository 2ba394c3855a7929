//! The unit of the index's memory, and the bits in its words.

use std::sync::atomic::Ordering::Relaxed;

use crate::sync::AtomicU64;

/// A cache line of words: eight hashes, or a page of a [`Cover`](crate::cover::Cover).
#[repr(align(64))]
#[derive(Default)]
pub struct Line(pub [AtomicU64; LINE_WORDS]);

pub const LINE_WORDS: usize = 8;

impl Line {
    #[inline]
    pub fn equals(&self, words: &[u64; LINE_WORDS]) -> bool {
        let pairs = self.0.iter().zip(words);
        pairs.fold(0, |all, (word, other)| all | (word.load(Relaxed) ^ other)) == 0
    }
}

/// The lowest `count` bits, `count` at most 64.
#[inline]
pub fn low_bits(count: usize) -> u64 {
    debug_assert!(count <= 64);
    if count == 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}
