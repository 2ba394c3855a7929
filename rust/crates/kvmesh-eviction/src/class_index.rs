//! Keeps what is worth most, by learned laws of return: a class index.
//!
//! Blocks are put in classes by their uses, in the cache or out of it, by how far into a conversation they are, by
//! whether they end their request, and by their request's hints. [`Laws`] learns from samples, evicted blocks included,
//! when blocks of a class return, and what a block of a class and an age is worth. The least worth leaves; a newcomer
//! that is worth still less is refused.

use std::collections::BTreeSet;

use crate::ghosts::Ghosts;
use crate::laws::{Laws, SampleId};
use crate::{BlockId, EvictionPolicy, Hints, Key, Tick, Use, entry};

/// Uses: 1, 2, 3-4, 5-8, 9-16, more.
const USES: usize = 6;
/// Each turn of a conversation was used once less than the one before: so many steps down since the chain's first
/// block; the last stands for more, too.
const STEPS: usize = 6;
/// None; only a session; will not return; will; after a tool call; will in seconds, tens of seconds, minutes, longer.
const HINTS: usize = 9;
const CLASSES: usize = USES * STEPS * 2 * HINTS;

/// Evicted blocks that are remembered for each block in the cache, and at least. Return times beyond the cache's own
/// span are learned from these.
const MEMORY: usize = 8;
const LEAST_MEMORY: usize = 16_384;
/// Seconds.
const DAY: f64 = 86_400.0;

/// What is remembered of a block, in the cache or not.
#[derive(Debug, Default, Clone, Copy)]
struct Known {
    uses: u32,
    /// The sample taken at its last use, if one was: else that of another block.
    sample: SampleId,
    /// Its last use: class and time.
    class: u32,
    seconds: f64,
}

#[derive(Debug, Clone)]
struct Block {
    key: Key,
    known: Known,
    used: Tick,
}

/// An offered block by what it is worth; of those worth the same, the one that was used first is the least.
type Ranked = (f64, Tick, BlockId);

/// The offered blocks of one class.
#[derive(Debug, Default, Clone)]
struct Offered {
    by_use: BTreeSet<(Tick, BlockId)>,
    /// The one worth least at `ranked_at`, if nothing has changed since.
    least: Option<Ranked>,
    ranked_at: f64,
}

/// How far along its chain the current operation is.
#[derive(Debug, Default)]
struct Place {
    tick: Tick,
    class: u32,
    uses: u32,
    steps: usize,
}

/// The policy. Memory: one entry a block, one tree entry an offered block, the remembered uses, and 1 MiB of samples and
/// laws.
#[derive(Debug)]
pub struct ClassIndex {
    laws: Laws,
    blocks: Vec<Option<Block>>,
    len: usize,
    ghosts: Ghosts<Known>,
    /// The block asked about last, counted already.
    asked: Option<(Key, Known)>,
    place: Place,
    offered: Vec<Offered>,
    /// Bit c: some block of class c is offered.
    nonempty: [u64; CLASSES.div_ceil(64)],
    /// The one worth least of all at `now`, if nothing has changed since.
    least: Option<Ranked>,
    now: f64,
    random: u64,
}

impl Default for ClassIndex {
    fn default() -> Self {
        Self {
            // Classes with one number of uses are a group.
            laws: Laws::new(CLASSES, USES),
            blocks: Vec::new(),
            len: 0,
            ghosts: Ghosts::default(),
            asked: None,
            place: Place::default(),
            offered: vec![Offered::default(); CLASSES],
            nonempty: [0; CLASSES.div_ceil(64)],
            least: None,
            now: 0.0,
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }
}

impl ClassIndex {
    /// A block was used once more.
    fn count(&mut self, known: &mut Known, at: &Use) {
        if self.now != at.seconds {
            self.now = at.seconds;
            self.least = None;
        }
        known.uses = known.uses.saturating_add(1);
        self.laws.close(known.sample, at.key, at.seconds);
        let begins = self.place.tick != at.tick;
        if begins {
            (self.place.tick, self.place.steps) = (at.tick, 0);
        } else if self.place.uses != known.uses {
            self.place.steps += 1;
        }
        self.place.uses = known.uses;
        let class = class(known.uses, self.place.steps, at);
        // Of blocks of one class that are used one after another one is watched, each with the same chance.
        let sample = if begins || self.place.class != class {
            Some(self.laws.open(at.key, class as usize, at.seconds))
        } else {
            let random = &mut self.random;
            self.laws.widen(at.key, |weight| {
                *random ^= *random << 13;
                *random ^= *random >> 7;
                *random ^= *random << 17;
                *random % u64::from(weight) == 0
            })
        };
        known.sample = sample.unwrap_or(known.sample);
        (known.class, known.seconds) = (class, at.seconds);
        self.place.class = class;
    }

    /// A block that is not in the cache was used once more.
    fn count_absent(&mut self, at: &Use) -> Known {
        if let Some((key, known)) = self.asked.take() {
            if key == at.key {
                return known;
            }
            self.remember(key, known);
        }
        let mut known = self.ghosts.take(at.key).unwrap_or_default();
        self.count(&mut known, at);
        known
    }

    fn remember(&mut self, key: Key, known: Known) {
        let room = LEAST_MEMORY.max(MEMORY * self.len);
        self.ghosts.put(key, known, room);
    }

    fn worth(&self, class: usize, block: BlockId) -> f64 {
        let used = self.blocks[block.at()].as_ref();
        let age = used.map_or(0.0, |block| self.now - block.known.seconds);
        self.laws.worth(class, age)
    }

    /// The offered block worth least. It is the first or the last by use of its class.
    fn least(&mut self) -> Option<Ranked> {
        if self.least.is_some() {
            return self.least;
        }
        let mut least: Option<Ranked> = None;
        for word in 0..self.nonempty.len() {
            let mut left = self.nonempty[word];
            while left != 0 {
                let of_class = self.least_of(word * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
                if let Some(of_class) = of_class
                    && least.is_none_or(|least| of_class < least)
                {
                    least = Some(of_class);
                }
            }
        }
        self.least = least;
        least
    }

    fn least_of(&mut self, class: usize) -> Option<Ranked> {
        let offered = &self.offered[class];
        if offered.least.is_none() || offered.ranked_at != self.now {
            let (&first, &last) = (offered.by_use.first()?, offered.by_use.last()?);
            let rank = |(used, block)| (self.worth(class, block), used, block);
            let (first, last) = (rank(first), rank(last));
            let offered = &mut self.offered[class];
            offered.ranked_at = self.now;
            offered.least = Some(if last < first { last } else { first });
        }
        self.offered[class].least
    }
}

impl EvictionPolicy for ClassIndex {
    fn used(&mut self, block: BlockId, at: &Use) {
        let known = match entry(&mut self.blocks, block).take() {
            Some(mut block) => {
                self.count(&mut block.known, at);
                block.known
            }
            None => {
                self.len += 1;
                self.count_absent(at)
            }
        };
        self.blocks[block.at()] = Some(Block {
            key: at.key,
            known,
            used: at.tick,
        });
    }

    fn admits(&mut self, at: &Use) -> bool {
        let known = self.count_absent(at);
        self.asked = Some((at.key, known));
        let newcomer = self.laws.worth(known.class as usize, 0.0);
        self.least().is_none_or(|(least, ..)| newcomer >= least)
    }

    fn offer(&mut self, block: BlockId) {
        let Some(known) = &self.blocks[block.at()] else {
            return;
        };
        let class = known.known.class as usize;
        self.offered[class].by_use.insert((known.used, block));
        self.offered[class].least = None;
        self.least = None;
        self.nonempty[class / 64] |= 1 << (class % 64);
    }

    fn withdraw(&mut self, block: BlockId) {
        let Some(Some(known)) = self.blocks.get(block.at()) else {
            return;
        };
        let class = known.known.class as usize;
        let offered = &mut self.offered[class];
        if offered.by_use.remove(&(known.used, block)) {
            offered.least = None;
            self.least = None;
            if offered.by_use.is_empty() {
                self.nonempty[class / 64] &= !(1 << (class % 64));
            }
        }
    }

    fn removed(&mut self, block: BlockId, _: bool) {
        if let Some(block) = self.blocks[block.at()].take() {
            self.len -= 1;
            self.remember(block.key, block.known);
        }
    }

    fn victim(&mut self) -> Option<BlockId> {
        self.least().map(|(_, _, block)| block)
    }

    fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        let present = self.blocks.get(block.at()).and_then(Option::as_ref);
        let known = (present.filter(|block| block.key == key))
            .map(|block| &block.known)
            .or_else(|| self.ghosts.get(key))?;
        let age = self.now - known.seconds;
        Some(self.laws.chance(known.class as usize, age, DAY))
    }
}

fn class(uses: u32, steps: usize, at: &Use) -> u32 {
    let uses = ((u32::BITS - (uses - 1).leading_zeros()) as usize).min(USES - 1);
    let steps = steps.min(STEPS - 1);
    (((hint(&at.hints) * 2 + usize::from(at.tail)) * STEPS + steps) * USES + uses) as u32
}

fn hint(hints: &Hints) -> usize {
    match (hints.returns, hints.returns_in, hints.tool_call) {
        (Some(false), ..) => 2,
        (_, Some(seconds), _) => 5 + [10.0, 60.0, 600.0].partition_point(|&limit| limit <= seconds),
        (_, _, true) => 4,
        (Some(true), ..) => 3,
        _ => usize::from(hints.session.is_some()),
    }
}
