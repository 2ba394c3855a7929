//! Which run a block lies in: a hash table that readers probe while writers change it.
//!
//! A bucket is one cache line: 11 places with 10 bits of their hash each. An entry lies in its home
//! bucket or one of the next few and stays where it is until it is removed, so a reader that finds
//! nothing knows that the block was not there all the time. A table never grows: a larger one is
//! filled and takes its place.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

use prefetch_index::prefetch_index;

use crate::{
    lock::{LOCKED, lock},
    run::{Place, RUN_BLOCKS},
    sync::{AtomicU32, AtomicU64},
};

/// Places in a bucket.
const PLACES: usize = 11;
/// Bits of a tag, and tags in a word.
const TAG_BITS: u32 = 10;
const TAGS: usize = 6;
/// The lowest tag of an entry; see [`equal`].
const LEAST_TAG: u16 = 2;
/// One in every tag of a bucket's first and second word.
const ONES: [u64; 2] = [ones(TAGS), ones(PLACES - TAGS)];
/// Buckets behind its home that an entry may lie in.
const MAX_REACH: usize = 7;
/// Bits that count the entries which lie one such bucket behind their home.
const BEHIND_BITS: u32 = 4;
const _: () = assert!(PLACES < 1 << BEHIND_BITS && MAX_REACH as u32 * BEHIND_BITS < LOCKED.ilog2());

/// Places and the places' tags (zero: no entry), and the lock with the numbers of entries that have their home here
/// and lie so many buckets behind: what is nowhere is looked for no further than somebody is.
#[repr(C, align(64))]
#[derive(Default)]
struct Bucket {
    places: [AtomicU32; PLACES],
    behind: AtomicU32,
    tags: [AtomicU64; 2],
}

impl Bucket {
    /// A bit for every position whose tag is `tag`, and for few others with entries; [`position`] says which.
    #[inline]
    fn tagged(&self, tag: u16) -> u64 {
        let [first, second] = [0, 1].map(|at| equal(self.tags[at].load(Acquire), tag, ONES[at]));
        first | second >> SECOND
    }

    /// The first answer of `each` for a place whose tag is `tag`. A position without an entry has the tag 0 and the place
    /// of the last one.
    #[inline]
    fn find<T>(&self, tag: u16, mut each: impl FnMut(Place) -> Option<T>) -> Option<T> {
        let mut tagged = self.tagged(tag);
        while tagged != 0 {
            let answer = each(self.place(position(tagged)));
            if answer.is_some() {
                return answer;
            }
            tagged &= tagged - 1;
        }
        None
    }

    #[inline]
    fn place(&self, at: usize) -> Place {
        Place::from_bits(self.places[at].load(Relaxed))
    }

    /// Writes an entry if there is room. This and what follows: under the lock.
    #[inline]
    fn put(&self, tag: u16, place: Place) -> bool {
        let free = self.tagged(0);
        if free != 0 {
            let at = position(free);
            self.places[at].store(place.bits(), Relaxed);
            self.flip_tag(at, tag);
        }
        free != 0
    }

    /// Removes the entry with this tag and place; false when there is none.
    #[inline]
    fn clear(&self, tag: u16, place: Place) -> bool {
        let mut tagged = self.tagged(tag);
        while tagged != 0 {
            let at = position(tagged);
            if self.place(at) == place {
                self.flip_tag(at, tag);
                return true;
            }
            tagged &= tagged - 1;
        }
        false
    }

    /// Makes a zero tag this one, and this one zero.
    #[inline]
    fn flip_tag(&self, at: usize, tag: u16) {
        let word = &self.tags[at / TAGS];
        let flipped = word.load(Relaxed) ^ u64::from(tag) << (at % TAGS * TAG_BITS as usize);
        word.store(flipped, Release);
    }
}

const fn ones(tags: usize) -> u64 {
    let (mut ones, mut at) = (0, 0);
    while at < tags {
        ones |= 1 << (at * TAG_BITS as usize);
        at += 1;
    }
    ones
}

/// The top bit of every tag of a word that is `tag`, without a branch (Mycroft, 1987), and of few tags that differ from it
/// in the last bit: never of one that is 0 where `tag` is not, nor the other way round, for no tag is 1.
#[inline]
fn equal(tags: u64, tag: u16, ones: u64) -> u64 {
    let differ = tags ^ (u64::from(tag) * ones);
    differ.wrapping_sub(ones) & !differ & (ones << (TAG_BITS - 1))
}

/// Bits by which those of a bucket's second word of tags lie below those of the first: an odd number, and half a tag's.
const SECOND: u32 = TAG_BITS / 2;

/// The position that the lowest bit of [`Bucket::tagged`] stands for.
#[inline]
fn position(tagged: u64) -> usize {
    let bit = tagged.trailing_zeros();
    let second = !bit & 1;
    (bit / TAG_BITS) as usize + second as usize * TAGS
}

/// One entry so many buckets behind its home, as those are counted.
fn one_behind(distance: usize) -> u32 {
    1 << ((distance as u32 - 1) * BEHIND_BITS)
}

/// How far behind its home any entry lies, by the counts of those that do.
#[inline]
fn reach(behind: u32) -> usize {
    (u32::BITS - behind.leading_zeros()).div_ceil(BEHIND_BITS) as usize
}

pub struct Table {
    buckets: Box<[Bucket]>,
    homes: usize,
    seed: u64,
}

/// Where a block belongs: a bucket, and below it the block's tag there.
#[derive(Clone, Copy, Default)]
struct Home(u64);

impl Home {
    #[inline]
    fn bucket(self) -> usize {
        (self.0 >> TAG_BITS) as usize
    }

    #[inline]
    fn tag(self) -> u16 {
        (self.0 % (1 << TAG_BITS)) as u16
    }
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
    fn home(&self, hash: u64) -> Home {
        let wide = u128::from(hash ^ self.seed) * 0x9e37_79b9_7f4a_7c15_u128;
        let mixed = (wide >> 64) as u64 ^ wide as u64;
        let bucket = (u128::from(mixed) * self.homes as u128) >> 64;
        let tag = (mixed % (1 << TAG_BITS)).max(LEAST_TAG.into());
        Home((bucket as u64) << TAG_BITS | tag)
    }

    /// The homes of blocks. Their buckets are asked for, then those of the blocks that come `next`.
    #[inline]
    fn homes_of<'a>(
        &self,
        hashes: &[u64],
        next: &[u64],
        into: &'a mut [Home; RUN_BLOCKS],
    ) -> &'a [Home] {
        let homes = &mut into[..hashes.len()];
        for (home, &hash) in homes.iter_mut().zip(hashes) {
            *home = self.home(hash);
            prefetch_index(&self.buckets, home.bucket());
        }
        self.expect(next);
        homes
    }

    /// Asks for the buckets of the first blocks, which are to be read soon: of as many as a run has.
    #[inline]
    pub fn expect(&self, hashes: &[u64]) {
        for &hash in hashes.iter().take(RUN_BLOCKS) {
            prefetch_index(&self.buckets, self.home(hash).bucket());
        }
    }

    /// The first answer of `each` for a place where the block may lie.
    #[inline]
    pub fn find<T>(&self, hash: u64, mut each: impl FnMut(Place) -> Option<T>) -> Option<T> {
        if self.homes == 0 {
            return None;
        }
        let home = self.home(hash);
        let bucket = &self.buckets[home.bucket()];
        let reach = reach(bucket.behind.load(Acquire) & !LOCKED);
        let mut near = self.buckets[home.bucket()..][..=reach].iter();
        near.find_map(|bucket| bucket.find(home.tag(), &mut each))
    }

    /// Adds at most [`RUN_BLOCKS`] blocks, which lie in a row from `first` on, up to one that cannot be added: how many, and
    /// what became of the next. `is_here` says whether a block is at a place, `alone` that nobody else writes.
    #[inline]
    pub fn insert(
        &self,
        hashes: &[u64],
        next: &[u64],
        first: Place,
        alone: bool,
        is_here: impl Fn(u64, Place) -> bool,
    ) -> (usize, Inserted) {
        // Two loops, one of them without locks.
        if alone {
            self.insert_all(hashes, next, first, true, is_here)
        } else {
            self.insert_all(hashes, next, first, false, is_here)
        }
    }

    #[inline(always)]
    fn insert_all(
        &self,
        hashes: &[u64],
        next: &[u64],
        first: Place,
        alone: bool,
        is_here: impl Fn(u64, Place) -> bool,
    ) -> (usize, Inserted) {
        if self.homes == 0 {
            return (0, Inserted::Full);
        }
        let mut homes = [Home::default(); RUN_BLOCKS];
        let homes = self.homes_of(hashes, next, &mut homes);
        for (at, (&hash, &home)) in hashes.iter().zip(homes).enumerate() {
            let bucket = &self.buckets[home.bucket()];
            let guard = lock(&bucket.behind, alone);
            let reach = reach(guard.get());
            let maybe = bucket.tagged(home.tag()) != 0 || reach > 0;
            if maybe && self.has(home, reach, |place| is_here(hash, place)) {
                return (at, Inserted::Known);
            }
            let place = first.behind(at);
            if bucket.put(home.tag(), place) {
                continue;
            }
            match self.insert_behind(home, place, alone) {
                Some(distance) => guard.set(guard.get() + one_behind(distance)),
                None => return (at, Inserted::Full),
            }
        }
        (hashes.len(), Inserted::Yes)
    }

    /// Whether a block has an entry in its home or the next `reach` buckets.
    #[inline(never)]
    fn has(&self, home: Home, reach: usize, is_here: impl Fn(Place) -> bool) -> bool {
        let mut near = self.buckets[home.bucket()..][..=reach].iter();
        near.any(|bucket| {
            let here = |place| is_here(place).then_some(());
            bucket.find(home.tag(), here).is_some()
        })
    }

    /// The next `reach` buckets behind a home.
    fn behind(&self, home: Home, reach: usize) -> &[Bucket] {
        &self.buckets[home.bucket() + 1..][..reach]
    }

    /// Adds a block whose home, which is locked, is full: how many buckets behind it.
    #[cold]
    fn insert_behind(&self, home: Home, place: Place, alone: bool) -> Option<usize> {
        let mut buckets = self.behind(home, MAX_REACH).iter().zip(1..);
        buckets.find_map(|(bucket, distance)| {
            // Other homes' entries may come in here; locks are taken in rising order.
            let _guard = lock(&bucket.behind, alone);
            bucket.put(home.tag(), place).then_some(distance)
        })
    }

    /// Removes at most [`RUN_BLOCKS`] blocks, which lie in a row from `first` on.
    #[inline]
    pub fn remove(&self, hashes: &[u64], next: &[u64], first: Place, alone: bool) {
        if alone {
            self.remove_all(hashes, next, first, true);
        } else {
            self.remove_all(hashes, next, first, false);
        }
    }

    #[inline(always)]
    fn remove_all(&self, hashes: &[u64], next: &[u64], first: Place, alone: bool) {
        let mut homes = [Home::default(); RUN_BLOCKS];
        let homes = self.homes_of(hashes, next, &mut homes);
        for (at, &home) in homes.iter().enumerate() {
            let place = first.behind(at);
            let bucket = &self.buckets[home.bucket()];
            let guard = lock(&bucket.behind, alone);
            if !bucket.clear(home.tag(), place) {
                let reach = reach(guard.get());
                let distance = self.remove_behind(home, reach, place, alone);
                guard.set(guard.get() - distance.map_or(0, one_behind));
            }
        }
    }

    /// Removes a block that is not in its home, which is locked: how many buckets behind it was.
    #[cold]
    fn remove_behind(&self, home: Home, reach: usize, place: Place, alone: bool) -> Option<usize> {
        let mut buckets = self.behind(home, reach).iter().zip(1..);
        let found = buckets.find_map(|(bucket, distance)| {
            let _guard = lock(&bucket.behind, alone);
            bucket.clear(home.tag(), place).then_some(distance)
        });
        debug_assert!(found.is_some(), "a block without an entry");
        found
    }
}
