//! A block's life in types.
//!
//! [`reserve`] gives [`Reserved`] slots; filling one makes it [`Filled`]; [`register`] makes blocks visible; a [`Lease`]
//! keeps registered blocks readable; [`Weak`] remembers them without keeping them. Dropping any of these undoes it, so
//! whoever owns them (a connection to an engine, say) can end at any moment and leave nothing behind.

use std::ops::Range;
use std::sync::Arc;

use kvmesh_core::Digest;

use crate::error::Result;
use crate::tiers::{NamespaceId, Room, Slot, Tier};

/// A slot that is this owner's alone, to be filled. Dropped, it is free again.
pub struct Reserved {
    tier: Arc<dyn Tier>,
    slot: Slot,
    given_up: bool,
}

/// What [`reserve`] found for one block.
pub enum Reservation {
    /// Fill this.
    Room(Reserved),
    /// The tier has the block, or somebody is filling it.
    Present,
    /// No room.
    Full,
}

/// Reserves room for the blocks of a chain that are not there yet; one answer a block.
pub fn reserve(
    tier: &Arc<dyn Tier>,
    namespace: NamespaceId,
    parent: Option<&Digest>,
    chain: &[Digest],
) -> Vec<Reservation> {
    owned(tier, tier.reserve(namespace, parent, chain))
}

/// The same for blocks that have to be kept: whatever may leave does, though it be worth more.
pub(crate) fn reserve_anyway(
    tier: &Arc<dyn Tier>,
    namespace: NamespaceId,
    parent: Option<&Digest>,
    chain: &[Digest],
) -> Vec<Reservation> {
    owned(tier, tier.reserve_anyway(namespace, parent, chain))
}

fn owned(tier: &Arc<dyn Tier>, rooms: Vec<Room>) -> Vec<Reservation> {
    rooms
        .into_iter()
        .map(|room| match room {
            Room::Reserved(slot) => Reservation::Room(Reserved {
                tier: tier.clone(),
                slot,
                given_up: true,
            }),
            Room::Present => Reservation::Present,
            Room::Full => Reservation::Full,
        })
        .collect()
}

impl Reserved {
    /// Where the block goes.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Writes the block.
    pub fn fill(self, segments: &[&[u8]]) -> Result<Filled> {
        self.tier.fill(self.slot, segments)?;
        self.seal()
    }

    /// Takes a block that another process has written here, if it is whole.
    pub fn seal(self) -> Result<Filled> {
        self.tier.seal(self.slot)?;
        Ok(Filled(self))
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.given_up {
            self.tier.abandon(&[self.slot]);
        }
    }
}

/// A slot that holds a whole block nobody else sees yet. Dropped, it is free again.
pub struct Filled(Reserved);

/// Makes filled blocks of one tier visible and immutable. They are the tier's from now on.
pub fn register(blocks: Vec<Filled>) {
    let Some(tier) = blocks.first().map(|block| block.0.tier.clone()) else {
        return;
    };
    let slots: Vec<Slot> = blocks
        .into_iter()
        .map(|Filled(mut reserved)| {
            reserved.given_up = false;
            reserved.slot
        })
        .collect();
    tier.register(&slots);
}

/// Keeps the leading blocks of a chain where they are, for reading. Dropped, they may be evicted again.
pub struct Lease {
    tier: Arc<dyn Tier>,
    namespace: NamespaceId,
    chain: Vec<Digest>,
    slots: Vec<Slot>,
}

/// Leases the leading registered blocks of `chain`, at most `limit`.
pub fn lease(
    tier: &Arc<dyn Tier>,
    namespace: NamespaceId,
    chain: &[Digest],
    limit: usize,
) -> Lease {
    let slots = tier.lease(namespace, chain, limit);
    Lease {
        tier: tier.clone(),
        namespace,
        chain: chain[..slots.len()].to_vec(),
        slots,
    }
}

impl Lease {
    /// The leased blocks' places, in chain order.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The name of block `index`.
    pub fn digest(&self, index: usize) -> Digest {
        self.chain[index]
    }

    /// Copies segments of block `index` to `out`, verified; a block that fails is dropped by its tier.
    pub fn read(&self, index: usize, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        self.tier.read(self.slots[index], segments, out)
    }

    /// Drops block `index`, whose bytes somebody found to be wrong.
    pub fn discard(&self, index: usize) {
        self.tier.discard(self.slots[index]);
    }

    /// Lets go of the blocks but remembers them.
    pub fn downgrade(self) -> Weak {
        Weak {
            tier: self.tier.clone(),
            namespace: self.namespace,
            chain: self.chain.clone(),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.tier.release(&self.slots);
    }
}

/// Blocks that may have been evicted meanwhile.
pub struct Weak {
    tier: Arc<dyn Tier>,
    namespace: NamespaceId,
    chain: Vec<Digest>,
}

impl Weak {
    /// Leases those leading blocks that are still there.
    pub fn upgrade(&self) -> Lease {
        lease(&self.tier, self.namespace, &self.chain, self.chain.len())
    }
}
