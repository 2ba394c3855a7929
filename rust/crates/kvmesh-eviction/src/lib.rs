//! Which block leaves a full tier, and which newcomer is not worth its room.
//!
//! A tier tells its policy of every use of a block, and which blocks may leave: those nobody reads and, so that no chain
//! is ever cut in the middle, those that no other block of the tier follows. The policy only ranks them: what is read,
//! pinned or followed is not offered, and what is not offered does not leave.
//!
//! * [`Lru`], [`Gdsf`], [`S3Fifo`]: the known ones.
//! * [`ClassIndex`]: ranks by learned laws of return.
//! * [`Voting`]: the default; `ClassIndex`, LRU and GDSF by vote, each weighed by what it would have hit.
//!
//! [`PrefixCache`] is a cache without bytes, in which `Voting` and [`simulate`] run policies.

mod class_index;
mod commitment;
mod gdsf;
mod ghosts;
mod laws;
mod lru;
mod prefix_cache;
mod s3fifo;
pub mod simulate;
mod votes;
mod voting;

use std::str::FromStr;

pub use class_index::ClassIndex;
pub use gdsf::Gdsf;
pub use ghosts::Ghosts;
pub use lru::Lru;
pub use prefix_cache::PrefixCache;
pub use s3fifo::S3Fifo;
pub use voting::Voting;

/// A point in the order of a tier's operations: all blocks of one chain that are used together share one.
pub type Tick = u64;

/// The number of a block while it is in a cache. Small, and used again after the block is gone, so that policies may
/// keep what they know in arrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    fn at(self) -> usize {
        self.0 as usize
    }
}

/// A block's number or none, in half the room of an option: what is kept of a block is read at random, and every cache
/// line counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link(u32);

impl Link {
    const NONE: Self = Self(u32::MAX);

    fn get(self) -> Option<BlockId> {
        (self != Self::NONE).then_some(BlockId(self.0))
    }
}

impl Default for Link {
    fn default() -> Self {
        Self::NONE
    }
}

impl From<Option<BlockId>> for Link {
    fn from(block: Option<BlockId>) -> Self {
        block.map_or(Self::NONE, |block| Self(block.0))
    }
}

/// The name of a block, in the cache or not. Two blocks with one name cost hits, nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub u64);

/// What a client says of its request's return. All of it may be wrong: policies learn what a hint is worth.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Hints {
    /// The conversation the request belongs to. Policies here use that it has one, not which.
    pub session: Option<u64>,
    /// Whether a request that continues this one will come.
    pub returns: Option<bool>,
    /// The request ends in a tool call; its result comes back as the next request.
    pub tool_call: bool,
    /// When it will come, in seconds from now.
    pub returns_in: Option<f32>,
}

/// One use of a block: it was read, or stored, or would have been.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// Which block.
    pub key: Key,
    /// The block before it in its chain.
    pub parent: Option<Key>,
    /// Whether the request's chain ends here.
    pub tail: bool,
    /// The operation; never decreases.
    pub tick: Tick,
    /// The time, in seconds since any fixed moment; never decreases.
    pub seconds: f64,
    /// The request's hints.
    pub hints: Hints,
}

/// One policy ranks the blocks of one cache. Every method is cheap enough to be called under the cache's lock:
/// O(log n) amortised. Same calls, same answers.
pub trait EvictionPolicy: Send {
    /// The block is used: it is in the cache, or is stored now. Called while it is not offered.
    fn used(&mut self, block: BlockId, at: &Use);
    /// There is no room for this block: whether to evict [`victim`](Self::victim) for it. Of a block that is refused
    /// this call is all the policy hears.
    fn admits(&mut self, at: &Use) -> bool;
    /// The block may leave.
    fn offer(&mut self, block: BlockId);
    /// The block may not leave any more. Harmless for a block that was not offered.
    fn withdraw(&mut self, block: BlockId);
    /// The block is gone: forget the number. It is not offered. `for_room`: it was a [`victim`](Self::victim), and left
    /// to make room.
    fn removed(&mut self, block: BlockId, for_room: bool);
    /// The offered block to evict next, which stays offered. None if none is offered.
    fn victim(&mut self) -> Option<BlockId>;
    /// How likely the block, in the cache or gone, is used again within a day; None without an opinion. Whether it is
    /// worth writing to a tier that wears depends on this.
    fn chance(&self, block: BlockId, key: Key) -> Option<f64> {
        let _ = (block, key);
        None
    }
}

/// The policies by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// [`Voting`].
    #[default]
    Default,
    /// [`ClassIndex`] alone.
    ClassIndex,
    /// [`Lru`].
    Lru,
    /// [`Gdsf`].
    Gdsf,
    /// [`S3Fifo`].
    S3Fifo,
}

impl Policy {
    /// All of them, the default first.
    pub const ALL: [Self; 5] = [
        Self::Default,
        Self::ClassIndex,
        Self::Lru,
        Self::Gdsf,
        Self::S3Fifo,
    ];

    /// The name users select it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::ClassIndex => "class-index",
            Self::Lru => "lru",
            Self::Gdsf => "gdsf",
            Self::S3Fifo => "s3-fifo",
        }
    }

    /// A policy for one cache.
    pub fn build(self) -> Box<dyn EvictionPolicy> {
        match self {
            Self::Default => Box::new(Voting::default()),
            Self::ClassIndex => Box::new(ClassIndex::default()),
            Self::Lru => Box::new(Lru::default()),
            Self::Gdsf => Box::new(Gdsf::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        (Self::ALL.into_iter())
            .find(|policy| policy.name() == name)
            .ok_or_else(|| format!("no eviction policy {name:?}; there are {known}"))
    }
}

/// The entry of a block in a policy's array, which grows to hold it.
fn entry<T: Default + Clone>(entries: &mut Vec<T>, block: BlockId) -> &mut T {
    if entries.len() <= block.at() {
        entries.resize(block.at() + 1, T::default());
    }
    &mut entries[block.at()]
}
