//! Memory that is given back to a pool and never to the allocator.
//!
//! A reader may therefore look at what a number names whenever it likes; it finds out afterwards
//! whether the memory was somebody else's by then. No reader ever needs a lock or a reference count.

use std::sync::atomic::Ordering::{Relaxed, Release};

use crossbeam_utils::CachePadded;
use prefetch_index::prefetch_index;

use crate::sync::{AtomicUsize, Mutex, OnceLock, fence};

/// Entries of the largest piece.
pub const MAX_PIECE: usize = 64;

/// Bytes in a chunk of an uncapped pool, and bytes a pool may have.
const CHUNK_BYTES: usize = 512 << 10;
const MAX_BYTES: usize = 4 << 30;

/// Bytes asked of the allocator, and the cap on them.
#[derive(Default)]
pub struct Budget {
    max: Option<usize>,
    used: CachePadded<AtomicUsize>,
}

impl Budget {
    pub fn new(max: Option<usize>) -> Self {
        Self {
            max,
            used: CachePadded::default(),
        }
    }

    pub fn max(&self) -> Option<usize> {
        self.max
    }

    pub fn used(&self) -> usize {
        self.used.load(Relaxed)
    }

    /// Books `bytes`; false when they would pass the cap.
    pub fn take(&self, bytes: usize) -> bool {
        let max = self.max.unwrap_or(usize::MAX);
        let grown = |used: usize| used.checked_add(bytes).filter(|&used| used <= max);
        self.used.fetch_update(Relaxed, Relaxed, grown).is_ok()
    }

    pub fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Relaxed);
    }
}

/// A pool of `T`s, numbered from 1 on.
pub struct Pool<T> {
    chunks: Box<[OnceLock<Box<[T]>>]>,
    chunk_bits: u32,
    /// Apart from what readers read.
    free: CachePadded<Mutex<Free>>,
}

struct Free {
    /// The first entry never used, and the end of its chunk.
    next: usize,
    end: usize,
    /// Pieces given back, by their number of entries.
    pieces: [Vec<u32>; MAX_PIECE + 1],
}

impl<T: Default> Pool<T> {
    /// A pool that may come to hold `max` bytes.
    pub fn new(max: Option<usize>) -> Self {
        // Small chunks below small caps, so that the last one does not keep much of the cap unused.
        let bytes = max.map_or(CHUNK_BYTES, |max| (max / 64).next_power_of_two());
        let entries = bytes.min(CHUNK_BYTES) / size_of::<T>();
        let entries = entries.max(2 * MAX_PIECE).next_power_of_two();
        let chunks = max.unwrap_or(MAX_BYTES).min(MAX_BYTES) / size_of::<T>() / entries;
        Self {
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            chunk_bits: entries.trailing_zeros(),
            free: CachePadded::new(Mutex::new(Free {
                next: 1,
                end: 0,
                pieces: [const { Vec::new() }; MAX_PIECE + 1],
            })),
        }
    }

    /// The `count` entries from `first` on; `None` where there are none such, as a reader may find when it
    /// has followed a number that somebody else wrote.
    #[inline]
    pub fn get(&self, first: u32, count: usize) -> Option<&[T]> {
        let chunk = self.chunks.get(first as usize >> self.chunk_bits)?.get()?;
        let at = first as usize & ((1 << self.chunk_bits) - 1);
        chunk.get(at..at + count)
    }

    /// Asks for `count` entries, which are to be read soon.
    #[inline]
    pub fn expect(&self, first: u32, count: usize) {
        let chunk = self.chunks.get(first as usize >> self.chunk_bits);
        if let Some(chunk) = chunk.and_then(OnceLock::get) {
            let at = first as usize & ((1 << self.chunk_bits) - 1);
            (at..at + count).for_each(|at| prefetch_index(chunk, at));
        }
    }

    /// One more than the highest number handed out so far.
    pub fn end(&self) -> u32 {
        self.free.lock().next as u32
    }

    /// A piece of `wanted` entries in a row, or of fewer, but at least `least`, where memory is short:
    /// the first one's number, and how many. They hold what their last user left, at first defaults.
    pub fn alloc(&self, wanted: usize, least: usize, budget: &Budget) -> Option<(u32, usize)> {
        debug_assert!(0 < least && least <= wanted && wanted <= MAX_PIECE);
        let mut free = self.free.lock();
        let piece = free.pieces[wanted]
            .pop()
            .map(|piece| (piece, wanted))
            .or_else(|| self.fresh(&mut free, wanted, budget))
            .or_else(|| split(&mut free, wanted))
            .or_else(|| {
                let smaller = (least..wanted).rev();
                smaller
                    .into_iter()
                    .find_map(|size| free.pieces[size].pop().map(|piece| (piece, size)))
            });
        // Whoever sees what is written there next also sees that its last meaning has ended.
        fence(Release);
        piece
    }

    /// Takes a piece back. Nobody may write to it any more; readers may still look.
    pub fn give(&self, piece: u32, count: usize) {
        self.free.lock().pieces[count].push(piece);
    }

    fn fresh(&self, free: &mut Free, wanted: usize, budget: &Budget) -> Option<(u32, usize)> {
        if free.next + wanted > free.end {
            let entries = 1 << self.chunk_bits;
            let number = free.end >> self.chunk_bits;
            let chunk = self.chunks.get(number)?;
            if !budget.take(entries * size_of::<T>()) {
                return None;
            }
            if free.next < free.end {
                free.pieces[free.end - free.next].push(free.next as u32);
            }
            chunk.get_or_init(|| (0..entries).map(|_| T::default()).collect());
            free.next = free.end.max(1);
            free.end += entries;
        }
        let piece = free.next as u32;
        free.next += wanted;
        Some((piece, wanted))
    }
}

/// A part of a larger piece.
fn split(free: &mut Free, wanted: usize) -> Option<(u32, usize)> {
    let size = (wanted + 1..=MAX_PIECE).find(|&size| !free.pieces[size].is_empty())?;
    let piece = free.pieces[size].pop()?;
    free.pieces[size - wanted].push(piece + wanted as u32);
    Some((piece, wanted))
}
