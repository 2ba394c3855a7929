//! The contract of a tier.
//!
//! A tier keeps blocks by digest under namespaces. A block is reserved, filled, registered, leased for reading and
//! evicted, always in batches that are chains: each block is the parent of the next. Callers hold blocks through the
//! types of [`crate::block`], which make the order of these steps a matter of compilation; the methods here are
//! what those types drive. `tests/conformance` runs every tier.

use std::ops::Range;
use std::sync::Arc;

use kvmesh_core::{BlockHash, Digest};

use crate::error::Result;
use crate::eviction::Hints;
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;

/// What a tier can do; callers and the conformance suite adapt to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Registered blocks are there until evicted.
    pub retains: bool,
    /// Other processes may map the tier and fill and read slots themselves.
    pub mapped: bool,
    /// Contents outlive the process.
    pub durable: bool,
}

/// A namespace opened in a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId(pub u32);

/// A place for one block. In a mapped tier, its byte offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u64);

/// A registered block, leased without its being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Its place.
    pub slot: Slot,
    /// Its namespace, by the tier's number.
    pub namespace: NamespaceId,
    /// Its name.
    pub digest: Digest,
}

/// Of blocks that an engine reads, those that came up from a lower tier and that none has read since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Origins {
    /// From the disk.
    pub nvme: u32,
    /// From other nodes, or from object storage.
    pub network: u32,
}

/// What became of the wish to store a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Here is a slot to fill.
    Reserved(Slot),
    /// The tier has the block, or somebody is filling it.
    Present,
    /// The tier has no room: everything that could leave is in use.
    Full,
}

/// Blocks that left a tier, by why; those with a wrong checksum are counted apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Made room for another block.
    pub room: u64,
    /// Lay where blocks of another layout came.
    pub layout: u64,
    /// Somebody asked for it.
    pub asked: u64,
}

impl Evicted {
    /// Each reason by name.
    pub fn by_reason(&self) -> [(&'static str, u64); 3] {
        [
            ("room", self.room),
            ("layout", self.layout),
            ("asked", self.asked),
        ]
    }
}

/// Gauges of this moment and totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes the tier can hold.
    pub capacity_bytes: u64,
    /// Bytes of slots that are taken.
    pub used_bytes: u64,
    /// Registered blocks.
    pub blocks: u64,
    /// Slots being filled or read.
    pub blocks_in_use: u64,
    /// Blocks registered.
    pub stored: u64,
    /// Blocks leased for reading.
    pub loaded: u64,
    /// Bytes of the blocks registered, with their headers.
    pub stored_bytes: u64,
    /// Of those leased for reading.
    pub loaded_bytes: u64,
    /// Look-ups for reading and for storing whose request had said something of its return.
    pub hinted: u64,
    /// Blocks that left, by why.
    pub evicted: Evicted,
    /// Of those that made room, blocks that should have been written to the tier below, which was behind.
    pub shed: u64,
    /// Blocks asked for.
    pub lookups: u64,
    /// Of these, found.
    pub hits: u64,
    /// Blocks dropped because their checksum did not match.
    pub corrupt: u64,
}

/// One place that keeps blocks. Methods may be called from any thread and wait for nothing but short locks, except
/// `fill` and `read`, which move a block's bytes.
pub trait Tier: Send + Sync {
    /// Which of a node's tiers this is, if it is one.
    fn kind(&self) -> Option<kvmesh_core::Tier>;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// Opens a namespace; equal namespaces get the same id. Fails where such blocks do not fit.
    fn open(&self, namespace: &Namespace) -> Result<NamespaceId>;

    /// The slot layout of an open namespace.
    fn layout(&self, namespace: NamespaceId) -> Arc<Layout>;

    /// What the requests that use any of these blocks from now on say of their return. Forgotten after some tens of
    /// thousands of others.
    fn hint(&self, namespace: NamespaceId, blocks: &[BlockHash], hints: Hints);

    /// How many leading blocks of the chain are registered.
    fn lookup(&self, namespace: NamespaceId, chain: &[Digest]) -> usize;

    /// Finds room for a chain's blocks, evicting others; one answer a block. `parent` is the block before the first,
    /// unless the first begins a prompt. After the first `Full`, all are.
    fn reserve(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room>;

    /// The same for blocks that have to be kept: whatever may leave does, though it be worth more. Of tiers that a flush
    /// writes to; others judge as ever.
    fn reserve_anyway(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        self.reserve(namespace, parent, chain)
    }

    /// Writes a reserved slot: all segments in order, then the header.
    fn fill(&self, slot: Slot, segments: &[&[u8]]) -> Result<()>;

    /// Checks that a reserved slot, whoever filled it, holds its whole block. Fails with `NotFilled`.
    fn seal(&self, slot: Slot) -> Result<()>;

    /// Gives up reserved or sealed slots.
    fn abandon(&self, slots: &[Slot]);

    /// Makes sealed blocks visible, immutable from now on. Where the tier does not retain, they are gone at once.
    fn register(&self, slots: &[Slot]);

    /// Leases the leading registered blocks of a chain: they stay until released. At most `limit` of them.
    fn lease(&self, namespace: NamespaceId, chain: &[Digest], limit: usize) -> Vec<Slot>;

    /// Leases registered blocks one after the other, at most `limit`, from the one behind `after` on; none: that was all.
    /// What is leased this way counts neither as looked up nor as used.
    fn walk(&self, after: Option<Slot>, limit: usize) -> Vec<Held>;

    /// The same of one block.
    fn hold(&self, namespace: NamespaceId, digest: &Digest) -> Option<Slot>;

    /// The digests of the leading registered blocks of a chain of which only these hashes are known. Counts as no
    /// look-up.
    fn digests(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Vec<Digest>;

    /// Copies segments of a leased block to `out`, verified. A block that fails is dropped, counted, and `Corrupt`.
    fn read(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()>;

    /// Ends one lease of each slot.
    fn release(&self, slots: &[Slot]);

    /// Drops a leased block whose bytes are wrong, and counts it. Its slot is free after the last lease.
    fn discard(&self, slot: Slot);

    /// Drops these blocks unless they are in use; returns how many.
    fn evict(&self, namespace: NamespaceId, blocks: &[Digest]) -> usize;

    /// Drops all blocks that are not in use; returns how many.
    fn flush(&self) -> usize;

    /// Gauges and totals.
    fn stats(&self) -> Stats;

    /// Where changes are noted, if the tier has any. Of parallel ranks, which hold the same blocks, only rank 0's.
    fn journal(&self) -> Option<&Journal>;

    /// The changes not drained yet, and after them the whole content as `Stored` changes.
    fn snapshot(&self) -> (Vec<Change>, Vec<Change>);
}
