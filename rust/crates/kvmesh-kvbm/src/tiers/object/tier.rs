//! The contract, on top of what is kept.

use std::ops::Range;
use std::sync::Arc;

use kvmesh_core::{BlockHash, Digest};

use super::{ObjectTier, pack};
use crate::copy::checksum;
use crate::error::{Error, Result};
use crate::eviction::Hints;
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;
use crate::tiers::contents::Contents;
use crate::tiers::{Capabilities, Held, NamespaceId, Room, Slot, Stats, Tier};

impl Tier for ObjectTier {
    fn kind(&self) -> Option<kvmesh_core::Tier> {
        Some(kvmesh_core::Tier::Network)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            retains: true,
            mapped: false,
            durable: true,
        }
    }

    fn open(&self, namespace: &Namespace) -> Result<NamespaceId> {
        self.contents.lock().catalog.open(namespace)
    }

    fn layout(&self, namespace: NamespaceId) -> Arc<Layout> {
        self.contents.lock().catalog.layout(namespace).clone()
    }

    fn hint(&self, namespace: NamespaceId, blocks: &[Digest], hints: Hints) {
        self.contents.lock().catalog.hint(namespace, blocks, hints);
    }

    fn lookup(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        self.contents.lock().catalog.lookup(namespace, chain)
    }

    fn reserve(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        let rooms = {
            let mut contents = self.contents.lock();
            if !contents.online || !self.settings().writable {
                return vec![Room::Full; chain.len()];
            }
            let Contents { catalog, epoch, .. } = &mut *contents;
            let rooms = catalog.reserve(&self.journal, namespace, parent, chain);
            let outside = |room| match room {
                Room::Reserved(slot) => Room::Reserved(epoch.outside(slot)),
                other => other,
            };
            rooms.into_iter().map(outside).collect()
        };
        // Those that made room.
        self.delete_removed();
        rooms
    }

    fn fill(&self, slot: Slot, segments: &[&[u8]]) -> Result<()> {
        let (digest, layout) = self.block(slot)?;
        {
            let contents = self.contents.lock();
            let inside = contents.inside(slot);
            if !inside.is_some_and(|slot| contents.catalog.is_reserved(slot)) {
                return Err(Error::NotFilled);
            }
        }
        let sizes = layout.segments().iter().map(|s| s.bytes);
        if !segments.iter().map(|bytes| bytes.len()).eq(sizes) {
            return Err(Error::Invalid(
                "the segments are not the namespace's".into(),
            ));
        }
        let checksums: Vec<u64> = segments.iter().map(|bytes| checksum(bytes)).collect();
        let body = pack(&layout, &digest, &checksums, segments);
        let own = self.own.upgrade().ok_or_else(|| self.broken("it is out"))?;
        let written = self.wait(async move { own.put(slot, body).await });
        written.unwrap_or_else(|| Err(self.broken("it is out")))
    }

    fn seal(&self, slot: Slot) -> Result<()> {
        let mut contents = self.contents.lock();
        let inside = contents.inside(slot).ok_or(Error::NotFilled)?;
        if contents.filled.remove(&inside) && contents.catalog.seal(inside) {
            Ok(())
        } else {
            Err(Error::NotFilled)
        }
    }

    fn abandon(&self, slots: &[Slot]) {
        let mut contents = self.contents.lock();
        for &slot in slots {
            if let Some(slot) = contents.inside(slot) {
                // What has been written may stay: it is whole, and the next listing finds it.
                contents.filled.remove(&slot);
                contents.catalog.abandon(slot);
            }
        }
    }

    fn register(&self, slots: &[Slot]) {
        let mut contents = self.contents.lock();
        let slots: Vec<Slot> = slots.iter().filter_map(|&s| contents.inside(s)).collect();
        contents.catalog.register(&self.journal, &slots);
    }

    fn lease(&self, namespace: NamespaceId, chain: &[Digest], limit: usize) -> Vec<Slot> {
        let mut contents = self.contents.lock();
        let slots = contents.catalog.lease(namespace, chain, limit);
        let slots = slots.into_iter().map(|slot| contents.epoch.outside(slot));
        slots.collect()
    }

    fn walk(&self, after: Option<Slot>, limit: usize) -> Vec<Held> {
        let mut contents = self.contents.lock();
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
        let mut contents = self.contents.lock();
        let slot = contents.catalog.hold_block(namespace, digest)?;
        Some(contents.epoch.outside(slot))
    }

    fn digests(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Vec<Digest> {
        self.contents.lock().catalog.digests(namespace, chain)
    }

    fn read(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        let read = self.verified(slot, segments, out);
        if matches!(read, Err(Error::Corrupt { .. })) {
            self.discard(slot);
        }
        read
    }

    fn release(&self, slots: &[Slot]) {
        let mut contents = self.contents.lock();
        for &slot in slots {
            if let Some(slot) = contents.inside(slot) {
                contents.catalog.release(slot);
            }
        }
    }

    fn discard(&self, slot: Slot) {
        {
            let mut contents = self.contents.lock();
            if let Some(slot) = contents.inside(slot) {
                contents.catalog.discard(&self.journal, slot);
            }
        }
        self.delete_removed();
    }

    fn evict(&self, namespace: NamespaceId, blocks: &[Digest]) -> usize {
        let evicted = (self.contents.lock().catalog).evict(&self.journal, namespace, blocks);
        self.delete_removed();
        evicted
    }

    fn flush(&self) -> usize {
        let flushed = self.contents.lock().catalog.flush(&self.journal);
        self.delete_removed();
        flushed
    }

    fn stats(&self) -> Stats {
        self.contents.lock().catalog.stats()
    }

    fn journal(&self) -> Option<&Journal> {
        Some(&self.journal)
    }

    fn snapshot(&self) -> (Vec<Change>, Vec<Change>) {
        let contents = self.contents.lock();
        // Changes are noted under the lock: these two belong together.
        (self.journal.drain(), contents.catalog.chains())
    }
}

impl ObjectTier {
    fn verified(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        let (digest, layout) = self.block(slot)?;
        let wanted = &layout.segments()[segments.clone()];
        if out.len() != wanted.iter().map(|segment| segment.bytes).sum::<usize>() {
            return Err(Error::Invalid(
                "the buffer does not have the segments' size".into(),
            ));
        }
        let own = self.own.upgrade().ok_or_else(|| self.broken("it is out"))?;
        let read = self.wait(async move { own.get(slot).await });
        let body = read.unwrap_or_else(|| Err(self.broken("it is out")))?;
        let parts = Self::proven(&body, &digest, &layout)
            .map_err(|what| Error::Corrupt { digest, what })?;
        let mut rest = out;
        for part in &parts[segments] {
            let (this, next) = rest.split_at_mut(part.len());
            this.copy_from_slice(part);
            rest = next;
        }
        Ok(())
    }
}
