//! A run: up to 64 blocks that lie together, and who holds which of them.
//!
//! **Readers** take no lock and write nothing. While a shape lasts, a position names one block, slots
//! and hashes are only ever added, and a mask is one word: whatever a reader picks up was so at
//! some moment of its call. Whoever gives a position, a slot or memory another meaning first publishes another
//! shape; a reader compares the shape before and after, and what it read in between counts only if
//! they agree. It starts over when a writer was *done*, so it never waits for one. What a run keeps in mind
//! of the runs behind it is a guess that is verified like any other place.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::{
    cover::Cover,
    line::{LINE_WORDS, Line},
    pool::Pool,
    sync::{AtomicU32, AtomicU64, fence},
};

/// Blocks in a full run: one bit of a mask each.
pub const RUN_BLOCKS: usize = 64;

/// Where a block lies: run and offset in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(u32);

impl Place {
    const OFFSET_BITS: u32 = RUN_BLOCKS.trailing_zeros();
    /// Runs that places can tell apart.
    pub const MAX_RUNS: u32 = 1 << (u32::BITS - Self::OFFSET_BITS);

    #[inline]
    pub fn new(run: u32, offset: usize) -> Self {
        debug_assert!(run < Self::MAX_RUNS && offset < RUN_BLOCKS);
        Self(run << Self::OFFSET_BITS | offset as u32)
    }

    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u32 {
        self.0
    }

    #[inline]
    pub fn run(self) -> u32 {
        self.0 >> Self::OFFSET_BITS
    }

    #[inline]
    pub fn offset(self) -> usize {
        self.0 as usize % RUN_BLOCKS
    }

    /// The place so many blocks further on in the same run.
    #[inline]
    pub fn behind(self, count: usize) -> Self {
        debug_assert!(self.offset() + count < RUN_BLOCKS);
        Self(self.0 + count as u32)
    }
}

/// What a run's positions mean: the lines with the hashes, how many there are, and a version.
/// 32 bits of line, 21 of version, 4 of capacity in lines, 7 of length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape(u64);

impl Shape {
    const VERSION: u64 = 1 << 11;
    const VERSIONS: u64 = 0x1f_ffff;

    #[inline]
    pub fn len(self) -> usize {
        (self.0 & 0x7f) as usize
    }

    /// The first line with hashes.
    #[inline]
    pub fn hashes(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Lines with hashes.
    #[inline]
    pub fn lines(self) -> usize {
        (self.0 >> 7 & 0xf) as usize
    }

    /// Hashes for which there are lines.
    #[inline]
    pub fn capacity(self) -> usize {
        self.lines() * LINE_WORDS
    }

    /// The same positions, and more or fewer of them.
    pub fn with_len(self, len: usize) -> Self {
        Self(self.0 & !0x7f | len as u64)
    }

    /// Another meaning of positions or memory.
    pub fn renewed(self, hashes: u32, lines: usize, len: usize) -> Self {
        let version = (self.0 / Self::VERSION + 1) & Self::VERSIONS;
        Self(
            (u64::from(hashes) << 32)
                | (version * Self::VERSION)
                | ((lines as u64) << 7)
                | len as u64,
        )
    }

    /// Whether what was read under one shape counts under the other: positions were at most added.
    #[inline]
    fn agrees(self, now: Self) -> bool {
        (self.0 ^ now.0) & !0x7f == 0
    }
}

/// Runs behind a run that it keeps in mind.
const NEXT: usize = 2;

/// Blocks in the order they were first stored. Fields other than the shape change under the lock.
#[repr(align(64))]
#[derive(Default)]
pub struct Run {
    shape: AtomicU64,
    touched: AtomicU64,
    next: [AtomicU32; NEXT],
    pub cover: Cover,
}

impl Run {
    #[inline]
    pub fn shape(&self) -> Shape {
        Shape(self.shape.load(Acquire))
    }

    /// Whether what was read since `shape` counts.
    #[inline]
    pub fn still(&self, shape: Shape) -> bool {
        fence(Acquire);
        shape.agrees(Shape(self.shape.load(Relaxed)))
    }

    /// Shows readers more positions.
    pub fn extend_to(&self, shape: Shape) {
        self.shape.store(shape.0, Release);
    }

    /// Ends the meaning of the last shape. What it named may be written over afterwards.
    pub fn renew(&self, shape: Shape) {
        self.shape.store(shape.0, Release);
        fence(Release);
    }

    /// The run that may start with this block, where this one has gone on to it before: saves looking the block up,
    /// and has to be verified.
    #[inline]
    pub fn next(&self, hash: u64) -> Option<u32> {
        let next = Place(self.next[hash as usize % NEXT].load(Relaxed));
        (next.run() != 0 && next.offset() == Self::tag(hash)).then(|| next.run())
    }

    pub fn set_next(&self, hash: u64, run: u32) {
        let next = Place::new(run, Self::tag(hash));
        self.next[hash as usize % NEXT].store(next.bits(), Relaxed);
    }

    /// Bits of a hash, so that few other runs are visited in vain.
    #[inline]
    fn tag(hash: u64) -> usize {
        hash as usize / NEXT % RUN_BLOCKS
    }

    /// When a match last passed; see [`crate::cap`].
    pub fn touched(&self) -> u64 {
        self.touched.load(Relaxed)
    }

    pub fn touch(&self, now: u64) {
        self.touched.store(now, Relaxed);
    }
}

/// The hashes that a shape names.
#[derive(Clone, Copy)]
pub struct Hashes<'a>(&'a [Line]);

impl<'a> Hashes<'a> {
    /// `None` for a shape that has ended.
    #[inline]
    pub fn of(shape: Shape, lines: &'a Pool<Line>) -> Option<Self> {
        match shape.lines() {
            0 => Some(Self(&[])),
            count => lines.get(shape.hashes(), count).map(Self),
        }
    }

    #[inline]
    pub fn get(self, at: usize) -> u64 {
        self.0[at / LINE_WORDS].0[at % LINE_WORDS].load(Relaxed)
    }

    /// Writes `hashes` at the positions from `from` on.
    #[inline]
    pub fn set(self, from: usize, hashes: &[u64]) {
        for (at, &hash) in (from..).zip(hashes) {
            self.0[at / LINE_WORDS].0[at % LINE_WORDS].store(hash, Relaxed);
        }
    }

    /// Copies the first `len` hashes.
    #[inline]
    pub fn copy(self, len: usize, into: &mut [u64; RUN_BLOCKS]) -> &[u64] {
        for (line, copies) in self.0.iter().zip(into.chunks_exact_mut(LINE_WORDS)) {
            for (word, copy) in line.0.iter().zip(copies) {
                *copy = word.load(Relaxed);
            }
        }
        &into[..len]
    }

    /// How many of the positions from `from` to `len` are the first of `hashes`.
    #[inline]
    pub fn common(self, from: usize, len: usize, hashes: &[u64]) -> usize {
        let hashes = &hashes[..hashes.len().min(len - from)];
        let mut rest = hashes;
        if from % LINE_WORDS == 0 {
            // A line at a time, without a branch on every hash.
            for line in &self.0[from / LINE_WORDS..] {
                match rest.split_first_chunk() {
                    Some((these, behind)) if line.equals(these) => rest = behind,
                    _ => break,
                }
            }
        }
        let at = hashes.len() - rest.len();
        at + rest
            .iter()
            .zip(from + at..)
            .take_while(|&(&hash, at)| self.get(at) == hash)
            .count()
    }
}

/// Lines that hold this many hashes.
pub fn lines_for(blocks: usize) -> usize {
    blocks.div_ceil(LINE_WORDS)
}
