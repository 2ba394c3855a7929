//! Who holds which blocks of one run.
//!
//! A list of entries, each a [`Key`] and a word: either one slot and a mask of the blocks it holds, or 64 slots side
//! by side that hold all of the run's first blocks, up to a span, and which of the 64 do. So a run
//! that one slot holds costs one entry, and so does a common prompt that 64 engines hold. A slot is in one entry; where
//! it moves from one to another it is shortly in both, each of them true.
//!
//! Readers look at an entry's word first, at its key afterwards. Writers change words as they like, for each is true
//! at every moment; a key changes while its word is 0 and after the run's shape has ended
//! ([`crate::run`]), and a slot leaves one entry for another likewise, with the new place written before.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::{
    holders::Slot,
    line::{LINE_WORDS, Line, low_bits},
    pool::{Budget, MAX_PIECE, Pool},
    sync::{AtomicU16, AtomicU32, AtomicU64},
};

/// Entries beside the run itself.
const INLINE: usize = 3;
/// Entries in a line of a page: six words, then the keys, 16 bits each, then (in a page's first
/// line) the number of the next page.
const LINE_ENTRIES: usize = 6;
const KEY_BITS: usize = 16;
const NEXT_SHIFT: u32 = 32;

/// What an entry's word means.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key(u16);

/// A [`Key`], taken apart.
pub enum Kind {
    /// The word is a mask of the slot's blocks.
    One(Slot),
    /// The word says which slots of this group hold the first so many blocks and no others.
    Group(u8, usize),
}

impl Key {
    const GROUP: u16 = 1 << 15;
    const SPAN_SHIFT: u32 = 8;

    fn one(slot: Slot) -> Self {
        Self(slot.bits())
    }

    fn group(group: u8, span: usize) -> Self {
        debug_assert!((1..=64).contains(&span));
        Self(Self::GROUP | ((span - 1) as u16) << Self::SPAN_SHIFT | u16::from(group))
    }

    #[inline]
    pub fn kind(self) -> Kind {
        if self.0 & Self::GROUP == 0 {
            return Kind::One(Slot::from_bits(self.0));
        }
        let span = (self.0 & !Self::GROUP) >> Self::SPAN_SHIFT;
        Kind::Group(self.0 as u8, usize::from(span) + 1)
    }

    /// The blocks that the entry gives `slot`.
    #[inline]
    fn share(self, word: u64, slot: Slot) -> u64 {
        match self.kind() {
            Kind::One(one) if one == slot => word,
            Kind::Group(group, span) if group == slot.group() && word & slot.member() != 0 => {
                low_bits(span)
            }
            _ => 0,
        }
    }

    /// The blocks that the entry gives anybody.
    #[inline]
    fn blocks(self, word: u64) -> u64 {
        match self.kind() {
            Kind::One(_) => word,
            Kind::Group(_, span) if word != 0 => low_bits(span),
            Kind::Group(..) => 0,
        }
    }
}

/// The blocks, where they are the first so many: how many.
fn prefix(blocks: u64) -> Option<usize> {
    (blocks != 0 && blocks & blocks.wrapping_add(1) == 0).then(|| blocks.trailing_ones() as usize)
}

/// The entries of a run.
#[derive(Default)]
pub struct Cover {
    /// The run's lock; here there is room for it.
    pub lock: AtomicU32,
    page: AtomicU32,
    count: AtomicU16,
    keys: [AtomicU16; INLINE],
    words: [AtomicU64; INLINE],
}

/// What a writer has found about a slot.
#[derive(Clone, Copy)]
pub struct Share {
    slot: Slot,
    /// The slot's blocks.
    pub blocks: u64,
    /// The blocks of all other slots.
    pub others: u64,
    /// The slot's entry.
    own: Option<(usize, Key)>,
    /// An entry without meaning.
    empty: Option<(usize, Key)>,
}

/// One entry, for writers.
enum Entry<'a> {
    Inline(&'a AtomicU16, &'a AtomicU64),
    Paged(&'a Line, usize),
}

impl<'a> Entry<'a> {
    fn word(&self) -> &'a AtomicU64 {
        match *self {
            Self::Inline(_, word) => word,
            Self::Paged(line, at) => &line.0[at],
        }
    }

    fn set_key(&self, key: Key) {
        match *self {
            Self::Inline(place, _) => place.store(key.0, Relaxed),
            Self::Paged(line, at) => {
                let word = &line.0[LINE_ENTRIES + at * KEY_BITS / u64::BITS as usize];
                let shift = at * KEY_BITS % u64::BITS as usize;
                let others = word.load(Relaxed) & !(u64::from(u16::MAX) << shift);
                word.store(others | u64::from(key.0) << shift, Relaxed);
            }
        }
    }
}

/// Lines of the page behind one of `lines` lines: few for a run of a few entries, and few pages for
/// one of many.
fn next_page(lines: usize) -> usize {
    (lines * 4).min(MAX_PIECE)
}

fn next_of(page: &[Line]) -> &AtomicU64 {
    &page[0].0[LINE_WORDS - 1]
}

impl Cover {
    /// Calls `each` with every entry's number, key and word. `Err` when a reader has met memory that is somebody
    /// else's by now.
    #[inline]
    fn for_entries(
        &self,
        lines: &Pool<Line>,
        mut each: impl FnMut(usize, Key, u64),
    ) -> Result<(), ()> {
        let count = usize::from(self.count.load(Acquire));
        for at in 0..count.min(INLINE) {
            let word = self.words[at].load(Acquire);
            each(at, Key(self.keys[at].load(Relaxed)), word);
        }
        if count > INLINE {
            self.for_paged(lines, count, each)
        } else {
            Ok(())
        }
    }

    fn for_paged(
        &self,
        lines: &Pool<Line>,
        count: usize,
        mut each: impl FnMut(usize, Key, u64),
    ) -> Result<(), ()> {
        let (mut page, mut size) = (self.page.load(Relaxed), 1);
        let mut at = INLINE;
        while at < count {
            let all = lines.get(page, size).ok_or(())?;
            for line in all {
                let words: [u64; LINE_ENTRIES] = std::array::from_fn(|at| line.0[at].load(Acquire));
                let keys = [&line.0[LINE_ENTRIES], &line.0[LINE_ENTRIES + 1]];
                let [low, high] = keys.map(|word| word.load(Relaxed));
                let mut keys = u128::from(high) << 64 | u128::from(low);
                for word in words.into_iter().take(count - at) {
                    each(at, Key(keys as u16), word);
                    keys >>= KEY_BITS;
                    at += 1;
                }
                if at == count {
                    break;
                }
            }
            page = (next_of(all).load(Relaxed) >> NEXT_SHIFT) as u32;
            size = next_page(size);
        }
        Ok(())
    }

    /// Asks for entries that are not beside the run itself.
    #[inline]
    pub fn expect(&self, lines: &Pool<Line>) {
        if usize::from(self.count.load(Relaxed)) > INLINE {
            lines.expect(self.page.load(Relaxed), 1);
        }
    }

    /// Adds every entry that may say something about the `wanted` blocks from `offset` on to `into`: a slot's with those
    /// of them that it holds, a group's as it is. False when the run's shape has changed.
    #[inline]
    pub fn read(
        &self,
        lines: &Pool<Line>,
        offset: usize,
        wanted: u64,
        into: &mut Vec<(Key, u64)>,
    ) -> bool {
        self.for_entries(lines, |_, key, word| {
            let word = match key.kind() {
                Kind::One(_) => word >> offset & wanted,
                Kind::Group(_, span) if span > offset => word,
                Kind::Group(..) => 0,
            };
            if word != 0 {
                into.push((key, word));
            }
        })
        .is_ok()
    }

    /// What a slot and what others hold. This and what follows: under the run's lock.
    pub fn share(&self, slot: Slot, lines: &Pool<Line>) -> Share {
        let mut share = Share {
            slot,
            blocks: 0,
            others: 0,
            own: None,
            empty: None,
        };
        let _ = self.for_entries(lines, |at, key, word| {
            if word == 0 {
                share.empty = share.empty.or(Some((at, key)));
                return;
            }
            let own = key.share(word, slot);
            if own == 0 {
                share.others |= key.blocks(word);
                return;
            }
            share.own = Some((at, key));
            share.blocks = own;
            if matches!(key.kind(), Kind::Group(..)) && word != slot.member() {
                share.others |= own;
            }
        });
        share
    }

    /// Every slot with its blocks.
    pub fn for_each(&self, lines: &Pool<Line>, mut each: impl FnMut(Slot, u64)) {
        let _ = self.for_entries(lines, |_, key, mut word| match key.kind() {
            Kind::One(slot) if word != 0 => each(slot, word),
            Kind::One(_) => {}
            Kind::Group(group, span) => {
                while word != 0 {
                    each(Slot::of_group(group, word.trailing_zeros()), low_bits(span));
                    word &= word - 1;
                }
            }
        });
    }

    /// Gives the slot these blocks instead of its `share`, as found since the lock was taken. `end` ends the run's shape.
    /// False when there is no memory for it; taking all is always possible.
    #[inline]
    pub fn set(
        &self,
        share: &Share,
        blocks: u64,
        lines: &Pool<Line>,
        budget: &Budget,
        end: impl Fn(),
    ) -> bool {
        let slot = share.slot;
        if blocks == share.blocks {
            return true; // below, a slot would join the group that it is in, and then leave it
        }
        if blocks == 0 {
            self.leave(slot, share.own, lines);
            return true;
        }
        let single = match share.own {
            Some((at, key)) if matches!(key.kind(), Kind::One(_)) => self.entry(at, lines),
            _ => None,
        };
        // Who loses blocks is likely to lose more, and keeps an entry of its own.
        let gains = blocks & !share.blocks != 0;
        let company = (gains || single.is_none())
            .then(|| self.company(share, blocks, lines))
            .flatten();
        let moved = match (company, single) {
            (None, Some(own)) => {
                own.word().store(blocks, Release);
                return true;
            }
            (None, None) => {
                if !self.add(share, Key::one(slot), blocks, lines, budget, &end) {
                    return false;
                }
                None
            }
            (Some((at, key)), _) => match key.kind() {
                Kind::Group(..) => {
                    let Some(group) = self.entry(at, lines) else {
                        return false;
                    };
                    let members = group.word().load(Relaxed) | slot.member();
                    group.word().store(members, Release);
                    None
                }
                Kind::One(other) => {
                    let key = Key::group(slot.group(), blocks.trailing_ones() as usize);
                    let members = slot.member() | other.member();
                    if !self.add(share, key, members, lines, budget, &end) {
                        return false;
                    }
                    Some((other, company))
                }
            },
        };
        if moved.is_some() || share.own.is_some() {
            end();
            self.leave(slot, share.own, lines);
            if let Some((other, entry)) = moved {
                self.leave(other, entry, lines);
            }
        }
        true
    }

    /// Takes a slot out of its entry.
    fn leave(&self, slot: Slot, entry: Option<(usize, Key)>, lines: &Pool<Line>) {
        let Some((at, key)) = entry else { return };
        if let Some(entry) = self.entry(at, lines) {
            let left = match key.kind() {
                Kind::One(_) => 0,
                Kind::Group(..) => entry.word().load(Relaxed) & !slot.member(),
            };
            entry.word().store(left, Release);
        }
    }

    /// The entry that a slot with these blocks may share: its group's, or that of another slot of the group with
    /// the same blocks.
    fn company(&self, share: &Share, blocks: u64, lines: &Pool<Line>) -> Option<(usize, Key)> {
        let span = prefix(blocks).filter(|_| share.others & blocks == blocks)?;
        let group = share.slot.group();
        let mut found = None;
        let _ = self.for_entries(lines, |at, key, word| {
            let fits = match key.kind() {
                Kind::Group(..) => key == Key::group(group, span) && word != 0,
                Kind::One(slot) => {
                    let same = word == blocks && slot.group() == group && slot != share.slot;
                    same && found.is_none()
                }
            };
            if fits {
                found = Some((at, key));
            }
        });
        found
    }

    /// Another entry; false when there is no memory for it.
    fn add(
        &self,
        share: &Share,
        key: Key,
        word: u64,
        lines: &Pool<Line>,
        budget: &Budget,
        end: impl Fn(),
    ) -> bool {
        let count = usize::from(self.count.load(Relaxed));
        let at = match share.empty {
            Some((at, last)) => {
                if last != key {
                    end();
                }
                at
            }
            None if count < INLINE || self.make_room(count - INLINE, lines, budget) => count,
            None => return false,
        };
        let Some(entry) = self.entry(at, lines) else {
            return false;
        };
        entry.set_key(key);
        entry.word().store(word, Release);
        if at == count {
            self.count.store((count + 1) as u16, Release);
        }
        true
    }

    /// The entry of this number.
    fn entry<'a>(&'a self, at: usize, lines: &'a Pool<Line>) -> Option<Entry<'a>> {
        let Some(mut at) = at.checked_sub(INLINE) else {
            return Some(Entry::Inline(&self.keys[at], &self.words[at]));
        };
        let (mut page, mut size) = (self.page.load(Relaxed), 1);
        loop {
            let all = lines.get(page, size)?;
            if at < size * LINE_ENTRIES {
                return Some(Entry::Paged(&all[at / LINE_ENTRIES], at % LINE_ENTRIES));
            }
            at -= size * LINE_ENTRIES;
            size = next_page(size);
            page = (next_of(all).load(Relaxed) >> NEXT_SHIFT) as u32;
        }
    }

    /// Memory for one more entry in pages beside `used` there; false when there is none.
    fn make_room(&self, mut used: usize, lines: &Pool<Line>, budget: &Budget) -> bool {
        let fresh = |size| lines.alloc(size, size, budget).map(|(page, _)| page);
        let mut size = 1;
        if used == 0 {
            return fresh(size).is_some_and(|page| {
                self.page.store(page, Relaxed);
                true
            });
        }
        let mut page = self.page.load(Relaxed);
        while let Some(all) = lines.get(page, size) {
            if used < size * LINE_ENTRIES {
                return true;
            }
            used -= size * LINE_ENTRIES;
            size = next_page(size);
            let link = next_of(all);
            if used == 0 {
                return fresh(size).is_some_and(|page| {
                    let others = link.load(Relaxed) & low_half();
                    link.store(others | u64::from(page) << NEXT_SHIFT, Relaxed);
                    true
                });
            }
            page = (link.load(Relaxed) >> NEXT_SHIFT) as u32;
        }
        false
    }

    /// Forgets all entries and gives their pages back. The run's shape must have ended.
    pub fn reset(&self, lines: &Pool<Line>) {
        let mut left = usize::from(self.count.load(Relaxed)).saturating_sub(INLINE);
        let (mut page, mut size) = (self.page.load(Relaxed), 1);
        while let Some(all) = lines.get(page, size).filter(|_| left > 0) {
            let next = (next_of(all).load(Relaxed) >> NEXT_SHIFT) as u32;
            lines.give(page, size);
            left = left.saturating_sub(size * LINE_ENTRIES);
            (page, size) = (next, next_page(size));
        }
        self.count.store(0, Relaxed);
    }
}

fn low_half() -> u64 {
    u64::from(u32::MAX)
}
