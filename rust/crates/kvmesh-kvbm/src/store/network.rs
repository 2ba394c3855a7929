//! Blocks that go from one node's store to another's: lent out of the host tier here, expected in the host tier there.
//!
//! Whoever moves the bytes reads a lent slot from its second word on into the expected one: the first word alone makes a
//! slot readable, and it is written here, after the checksums were right.

use std::sync::Arc;

use kvmesh_core::Digest;

use super::Store;
use crate::block::Lease;
use crate::image::Layout;
use crate::namespace::Namespace;
use crate::slot;
use crate::tiers::{HostTier, NamespaceId, Room, Slot, Tier, parts};

/// Bytes at a slot's start that are not moved.
pub const WORD: usize = 8;

/// Blocks another store may read where they lie. Dropped, they may be evicted again.
pub struct Lent {
    host: Arc<HostTier>,
    layout: Arc<Layout>,
    lease: Lease,
    digests: Vec<Digest>,
}

impl Lent {
    /// The blocks, in chain order.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// Their places in the arena.
    pub fn slots(&self) -> &[Slot] {
        &self.lease.slots()[..self.digests.len()]
    }

    /// Bytes of each.
    pub fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes()
    }

    /// Somebody read these blocks and found them wrong: those that are wrong here are dropped; how many. Blocks.
    pub fn doubt(&self, places: &[usize]) -> usize {
        let blocks = places.iter().filter(|&&place| place < self.digests.len());
        let bad = blocks.filter(|&&place| {
            let (slot, digest) = (self.lease.slots()[place], &self.digests[place]);
            self.host.proven(slot, digest, &self.layout).is_none()
        });
        bad.map(|&place| self.lease.discard(place)).count()
    }
}

/// Slots of blocks that are on their way from another store. Engines may lease them and wait. Dropped, what has not
/// arrived will not come, and its slots are free.
pub struct Incoming {
    host: Arc<HostTier>,
    layout: Arc<Layout>,
    blocks: Vec<Expected>,
}

/// One block that is on its way.
#[derive(Debug, Clone, Copy)]
pub struct Expected {
    /// Its place in the chain that was expected.
    pub place: usize,
    /// Where its bytes go.
    pub slot: Slot,
    digest: Digest,
}

impl Incoming {
    /// What has not arrived.
    pub fn blocks(&self) -> &[Expected] {
        &self.blocks
    }

    /// Bytes of each.
    pub fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes()
    }

    /// Reserves room for those blocks of a chain that are not in the host tier; `parent` is the block before the first.
    /// Fewer where there is no room for all.
    pub(super) fn expect(
        host: &Arc<HostTier>,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Self {
        let rooms = host.expect(namespace, parent, chain, kvmesh_core::Tier::Network);
        let blocks = (rooms.into_iter().zip(chain).enumerate())
            .filter_map(|(place, (room, &digest))| match room {
                Room::Reserved(slot) => Some(Expected {
                    place,
                    slot,
                    digest,
                }),
                Room::Present | Room::Full => None,
            })
            .collect();
        Self {
            host: host.clone(),
            layout: host.layout(namespace),
            blocks,
        }
    }

    /// One block's object has been read: it can be read from now on, if it is whole; it is gone if not.
    pub(super) fn arrived_as(&mut self, place: usize, object: Option<&[u8]>) -> bool {
        let Some(at) = (self.blocks.iter()).position(|block| block.place == place) else {
            return false;
        };
        let block = self.blocks.swap_remove(at);
        let parts = object.and_then(|object| parts(object, &self.layout));
        if let Some((header, segments)) = &parts {
            (self.host).unpack(block.slot, &self.layout, header, segments);
            slot::rest(self.host.arena(), block.slot.0);
        }
        (self.host).arrived(block.slot, &block.digest, &self.layout, parts.is_none())
    }

    /// All bytes have been read into their slots. Blocks that are whole can be read from now on; the places of the others,
    /// which are gone. Blocks.
    pub fn arrived(&mut self) -> Vec<usize> {
        let mut bad = Vec::new();
        for block in std::mem::take(&mut self.blocks) {
            slot::rest(self.host.arena(), block.slot.0);
            if !(self.host).arrived(block.slot, &block.digest, &self.layout, false) {
                bad.push(block.place);
            }
        }
        bad
    }

    /// Nobody needs to wait for these any more. Their slots stay taken, since bytes may still be on their way.
    pub fn give_up(&self) {
        for block in &self.blocks {
            self.host.forsake(block.slot);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        for block in &self.blocks {
            (self.host).arrived(block.slot, &block.digest, &self.layout, true);
        }
    }
}

impl Store {
    /// The number of exactly this namespace, if anybody asked for it here or the disk has it.
    pub fn find(&self, namespace: &Namespace) -> Option<NamespaceId> {
        (self.namespaces_of(&namespace.model).into_iter())
            .find(|&id| self.name_of(id) == *namespace)
    }

    /// Lends the leading blocks of a chain, those on the disk included, which are read up first. None of an unknown
    /// namespace. Blocks.
    pub fn lend(&self, namespace: &Namespace, chain: &[Digest]) -> Option<Lent> {
        let id = self.find(namespace)?;
        let (lease, coming) = self.lease(id, chain);
        for place in coming {
            self.host.wait_arrival(lease.slots()[place as usize]);
        }
        let leased = &chain[..lease.slots().len()];
        let there = leased
            .iter()
            .take_while(|digest| self.host.holds(id, digest));
        Some(Lent {
            host: self.host.clone(),
            layout: self.host.layout(id),
            digests: there.copied().collect(),
            lease,
        })
    }

    /// Reserves room for those blocks of a chain that are not here, for bytes that come from another store; `parent` is the
    /// block before the first. Fewer where there is no room for all.
    pub fn expect(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Incoming {
        self.expire_pins();
        Incoming::expect(&self.host, namespace, parent, chain)
    }
}
