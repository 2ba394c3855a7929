//! The contract, for tiers that keep their bytes where they may fail or vanish: everything but how bytes get there.

use std::ops::Range;
use std::sync::Arc;

use kvmesh_core::{BlockHash, Digest};
use parking_lot::Mutex;

use super::catalog::Catalog;
use super::contents::Contents;
use super::{Capabilities, Held, NamespaceId, Room, Slot, Stats, Tier};
use crate::copy::checksum;
use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;

/// A tier whose catalog is in memory and whose bytes are elsewhere. Whatever implements this is a [`Tier`].
pub(super) trait Kept: Send + Sync {
    /// Which of a node's tiers it is.
    const KIND: kvmesh_core::Tier;

    /// What it holds.
    fn contents(&self) -> &Mutex<Contents>;

    /// Where changes are noted.
    fn changes(&self) -> &Journal;

    /// As `Tier::open`.
    fn open_kept(&self, namespace: &Namespace) -> Result<NamespaceId>;

    /// Whether blocks may be stored at all while it is online.
    fn is_writable(&self) -> bool;

    /// Blocks have left for newcomers, which are not written yet.
    fn made_room(&self);

    /// Blocks were registered, or have left.
    fn changed(&self);

    /// Writes a reserved slot's block; it may be sealed then. Blocks.
    fn write_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        checksums: &[u64],
        segments: &[&[u8]],
    ) -> Result<()>;

    /// Copies segments of a leased slot's block to `out`, which has their size, verified. Blocks.
    fn read_block(
        &self,
        slot: Slot,
        digest: &Digest,
        layout: &Layout,
        segments: Range<usize>,
        out: &mut [u8],
    ) -> Result<()>;
}

/// Reserves in the catalog, while the tier may be written.
fn reserve(
    tier: &impl Kept,
    blocks: usize,
    in_catalog: impl FnOnce(&mut Catalog) -> Vec<Room>,
) -> Vec<Room> {
    let rooms = {
        let mut contents = tier.contents().lock();
        if !contents.online || !tier.is_writable() {
            return vec![Room::Full; blocks];
        }
        let Contents { catalog, epoch, .. } = &mut *contents;
        let outside = |room| match room {
            Room::Reserved(slot) => Room::Reserved(epoch.outside(slot)),
            other => other,
        };
        let rooms = in_catalog(catalog).into_iter();
        rooms.map(outside).collect()
    };
    tier.made_room();
    rooms
}

impl<T: Kept> Tier for T {
    fn kind(&self) -> Option<kvmesh_core::Tier> {
        Some(T::KIND)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            retains: true,
            mapped: false,
            durable: true,
        }
    }

    fn open(&self, namespace: &Namespace) -> Result<NamespaceId> {
        self.open_kept(namespace)
    }

    fn layout(&self, namespace: NamespaceId) -> Arc<Layout> {
        self.contents().lock().catalog.layout(namespace).clone()
    }

    fn hint(&self, namespace: NamespaceId, blocks: &[BlockHash], hints: Hints) {
        (self.contents().lock().catalog).hint(namespace, blocks, hints);
    }

    fn lookup(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        self.contents().lock().catalog.lookup(namespace, chain)
    }

    fn reserve(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        reserve(self, chain.len(), |catalog| {
            catalog.reserve(self.changes(), namespace, parent, chain)
        })
    }

    fn reserve_anyway(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        reserve(self, chain.len(), |catalog| {
            catalog.reserve_anyway(self.changes(), namespace, parent, chain)
        })
    }

    fn fill(&self, slot: Slot, segments: &[&[u8]]) -> Result<()> {
        let (digest, layout) = self.contents().lock().reserved(slot)?;
        let sizes = layout.segments().iter().map(|segment| segment.bytes);
        if !segments.iter().map(|bytes| bytes.len()).eq(sizes) {
            return Err(Error::Invalid(
                "the segments are not the namespace's".into(),
            ));
        }
        let checksums: Vec<u64> = segments.iter().map(|bytes| checksum(bytes)).collect();
        self.write_block(slot, &digest, &layout, &checksums, segments)
    }

    fn seal(&self, slot: Slot) -> Result<()> {
        let mut contents = self.contents().lock();
        let inside = contents.inside(slot).ok_or(Error::NotFilled)?;
        if contents.filled.remove(&inside) && contents.catalog.seal(inside) {
            Ok(())
        } else {
            Err(Error::NotFilled)
        }
    }

    fn abandon(&self, slots: &[Slot]) {
        let mut contents = self.contents().lock();
        for &slot in slots {
            if let Some(slot) = contents.inside(slot) {
                contents.filled.remove(&slot);
                contents.catalog.abandon(slot);
            }
        }
    }

    fn register(&self, slots: &[Slot]) {
        {
            let mut contents = self.contents().lock();
            let slots: Vec<Slot> = slots.iter().filter_map(|&s| contents.inside(s)).collect();
            contents.catalog.register(self.changes(), &slots);
        }
        self.changed();
    }

    fn lease(&self, namespace: NamespaceId, chain: &[Digest], limit: usize) -> Vec<Slot> {
        let mut contents = self.contents().lock();
        let slots = contents.catalog.lease(namespace, chain, limit);
        let slots = slots.into_iter().map(|slot| contents.epoch.outside(slot));
        slots.collect()
    }

    fn walk(&self, after: Option<Slot>, limit: usize) -> Vec<Held> {
        let mut contents = self.contents().lock();
        let after = match after.map(|slot| contents.inside(slot)) {
            // What lay behind it went with the time it is of.
            Some(None) => return Vec::new(),
            after => after.flatten(),
        };
        let held = contents.catalog.walk(after, limit);
        let outside = |block: Held| Held {
            slot: contents.epoch.outside(block.slot),
            ..block
        };
        held.into_iter().map(outside).collect()
    }

    fn hold(&self, namespace: NamespaceId, digest: &Digest) -> Option<Slot> {
        let mut contents = self.contents().lock();
        let slot = contents.catalog.hold_block(namespace, digest)?;
        Some(contents.epoch.outside(slot))
    }

    fn digests(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Vec<Digest> {
        self.contents().lock().catalog.digests(namespace, chain)
    }

    fn read(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        let (digest, layout) = self.contents().lock().block(slot)?;
        let wanted = &layout.segments()[segments.clone()];
        if out.len() != wanted.iter().map(|segment| segment.bytes).sum::<usize>() {
            return Err(Error::Invalid(
                "the buffer does not have the segments' size".into(),
            ));
        }
        let read = self.read_block(slot, &digest, &layout, segments, out);
        if matches!(read, Err(Error::Corrupt { .. })) {
            self.discard(slot);
        }
        read
    }

    fn release(&self, slots: &[Slot]) {
        let mut contents = self.contents().lock();
        for &slot in slots {
            if let Some(slot) = contents.inside(slot) {
                contents.catalog.release(slot);
            }
        }
    }

    fn discard(&self, slot: Slot) {
        {
            let mut contents = self.contents().lock();
            if let Some(slot) = contents.inside(slot) {
                contents.catalog.discard(self.changes(), slot);
            }
        }
        self.changed();
    }

    fn evict(&self, namespace: NamespaceId, blocks: &[Digest]) -> usize {
        let evicted = (self.contents().lock().catalog).evict(self.changes(), namespace, blocks);
        self.changed();
        evicted
    }

    fn flush(&self) -> usize {
        let flushed = self.contents().lock().catalog.flush(self.changes());
        self.changed();
        flushed
    }

    fn stats(&self) -> Stats {
        self.contents().lock().catalog.stats()
    }

    fn journal(&self) -> Option<&Journal> {
        Some(self.changes())
    }

    fn snapshot(&self) -> (Vec<Change>, Vec<Change>) {
        let contents = self.contents().lock();
        // Changes are noted under the lock: these two belong together.
        (self.changes().drain(), contents.catalog.chains())
    }
}
