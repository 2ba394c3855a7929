//! Which run a block lies in: a hash table that readers probe while writers change it.
//!
//! A bucket is one cache line: 12 places with a byte of their hash each. An entry lies in its home
//! bucket or one of the next few and stays where it is until it is removed, so a reader that finds
//! nothing knows that the block was not there all the time. A table never grows: a larger one is
//! filled and takes its place.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use crate::{
    lock::{LOCKED, lock},
    run::Place,
    sync::{AtomicU32, AtomicU64},
};

/// Places in a bucket.
const PLACES: usize = 12;
/// Buckets behind its home that an entry may lie in.
const MAX_REACH: usize = 8;
/// Tags in a bucket's first word of them.
const TAGS: usize = 8;
/// One in every tag of a word.
const ONES: u64 = 0x0101_0101_0101_0101;

/// Places and the places' tags (a zero byte: no entry), the lock, and how many buckets further entries with this home
/// were ever put.
#[repr(C, align(64))]
#[derive(Default)]
struct Bucket {
    places: [AtomicU32; PLACES],
    tags: AtomicU64,
    more_tags: AtomicU32,
    reach: AtomicU32,
}

impl Bucket {
    /// Calls `each` with the positions whose tag is `tag`, until it answers. A position without an entry has the tag
    /// 0 and the place of the last one.
    #[inline]
    fn tagged<T>(&self, tag: u8, mut each: impl FnMut(usize) -> Option<T>) -> Option<T> {
        let mut equal = positions(self.tags.load(Acquire), tag);
        while equal != 0 {
            let answer = each(equal.trailing_zeros() as usize / 8);
            if answer.is_some() {
                return answer;
            }
            equal &= equal - 1;
        }
        let more = u64::from(self.more_tags.load(Acquire));
        let mut equal = positions(more, tag) as u32;
        while equal != 0 {
            let answer = each(TAGS + equal.trailing_zeros() as usize / 8);
            if answer.is_some() {
                return answer;
            }
            equal &= equal - 1;
        }
        None
    }

    #[inline]
    fn place(&self, at: usize) -> Place {
        Place::from_bits(self.places[at].load(Relaxed))
    }

    /// Under the lock.
    #[inline]
    fn set_tag(&self, at: usize, tag: u8) {
        if let Some(at) = at.checked_sub(TAGS) {
            let others = self.more_tags.load(Relaxed) & !(0xff << (at * 8));
            self.more_tags
                .store(others | u32::from(tag) << (at * 8), Release);
        } else {
            let others = self.tags.load(Relaxed) & !(0xff << (at * 8));
            self.tags
                .store(others | u64::from(tag) << (at * 8), Release);
        }
    }
}

/// The top bit of every byte that is `tag`, without a branch (Warren, Hacker's Delight, 6-1).
#[inline]
fn positions(tags: u64, tag: u8) -> u64 {
    let differ = tags ^ (u64::from(tag) * ONES);
    let low = ONES * 0x7f;
    !(((differ & low) + low) | differ | low)
}

pub struct Table {
    buckets: Box<[Bucket]>,
    homes: usize,
    seed: u64,
}

/// What became of an insertion.
#[derive(PartialEq, Eq)]
pub enum Inserted {
    Yes,
    /// The block has a place.
    Known,
    /// There is no room near its home.
    Full,
}

impl Table {
    /// A table of this many buckets.
    pub fn new(homes: usize) -> Self {
        let buckets = if homes == 0 { 0 } else { homes + MAX_REACH };
        Self {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            homes,
            // Nobody can choose hashes that collide.
            seed: RandomState::new().hash_one(0),
        }
    }

    pub fn homes(&self) -> usize {
        self.homes
    }

    /// Bytes a table of this many buckets asks of the allocator.
    pub fn bytes(homes: usize) -> usize {
        (homes + MAX_REACH) * size_of::<Bucket>()
    }

    /// Buckets that hold `len` entries well.
    pub fn homes_for(len: usize) -> usize {
        (len * 5).div_ceil(PLACES * 4)
    }

    /// Entries it holds well.
    pub fn capacity(&self) -> usize {
        self.homes * PLACES * 4 / 5
    }

    #[inline]
    fn spread(&self, hash: u64) -> (usize, u8) {
        let wide = u128::from(hash ^ self.seed) * 0x9e37_79b9_7f4a_7c15_u128;
        let mixed = (wide >> 64) as u64 ^ wide as u64;
        let home = (u128::from(mixed) * self.homes as u128) >> 64;
        (home as usize, (mixed as u8).max(1))
    }

    /// Brings the block's bucket into the cache: asked for many at once, they come together.
    #[inline]
    pub fn touch(&self, hash: u64) -> u32 {
        let (home, _) = self.spread(hash);
        self.buckets.get(home).map_or(0, |b| b.reach.load(Relaxed))
    }

    /// The first answer of `each` for a place where the block may lie.
    #[inline]
    pub fn find<T>(&self, hash: u64, mut each: impl FnMut(Place) -> Option<T>) -> Option<T> {
        if self.homes == 0 {
            return None;
        }
        let (home, tag) = self.spread(hash);
        let reach = (self.buckets[home].reach.load(Acquire) & !LOCKED) as usize;
        self.buckets[home..=home + reach]
            .iter()
            .find_map(|bucket| bucket.tagged(tag, |at| each(bucket.place(at))))
    }

    /// Adds a block; `is_here` says whether a place is the block's, `alone` that nobody else writes.
    #[inline]
    pub fn insert(
        &self,
        hash: u64,
        place: Place,
        alone: bool,
        is_here: impl Fn(Place) -> bool,
    ) -> Inserted {
        if self.homes == 0 {
            return Inserted::Full;
        }
        let (home, tag) = self.spread(hash);
        let guard = lock(&self.buckets[home].reach, alone);
        let reach = guard.get() as usize;
        for bucket in &self.buckets[home..=home + reach] {
            let known = bucket.tagged(tag, |at| is_here(bucket.place(at)).then_some(()));
            if known.is_some() {
                return Inserted::Known;
            }
        }
        for distance in 0..=MAX_REACH {
            let bucket = &self.buckets[home + distance];
            // Other homes' entries may come in here; locks are taken in rising order.
            let _neighbour = (distance > 0).then(|| lock(&bucket.reach, alone));
            let Some(at) = bucket.tagged(0, Some) else {
                continue;
            };
            bucket.places[at].store(place.bits(), Relaxed);
            if distance > reach {
                guard.set(distance as u32);
            }
            bucket.set_tag(at, tag);
            return Inserted::Yes;
        }
        Inserted::Full
    }

    /// Removes the block that lies at `place`.
    #[inline]
    pub fn remove(&self, hash: u64, place: Place, alone: bool) {
        let (home, tag) = self.spread(hash);
        let guard = lock(&self.buckets[home].reach, alone);
        for distance in 0..=guard.get() as usize {
            let bucket = &self.buckets[home + distance];
            let _neighbour = (distance > 0).then(|| lock(&bucket.reach, alone));
            let here = |at: usize| (bucket.place(at) == place).then_some(at);
            if let Some(at) = bucket.tagged(tag, here) {
                bucket.set_tag(at, 0);
                return;
            }
        }
        debug_assert!(false, "a block without an entry");
    }
}
