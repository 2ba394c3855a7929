//! The host tier: slots in an arena of shared memory, which the engines of the node map.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::catalog::Catalog;
use super::{Capabilities, Held, NamespaceId, Room, Slot, Stats, TenantWeights, Tier};
use crate::arena::Arena;
use crate::error::{Error, Result};
use crate::eviction::{Hints, Policy};
use crate::image::Layout;
use crate::journal::{Change, Journal};
use crate::namespace::Namespace;
use crate::slot;
use crate::sync::{Condvar, Mutex};
use kvmesh_core::{BlockHash, Digest};

/// Blocks in shared memory. Space is allocated when the tier is made.
pub struct HostTier {
    pub(super) arena: Arc<Arena>,
    pub(super) catalog: Mutex<Catalog>,
    pub(super) journal: Journal,
    /// Something has arrived from below, or will not come, or was written there.
    pub(super) moved: Condvar,
}

impl HostTier {
    /// A tier of `bytes` in `dir`, evicting by the default policy.
    pub fn new(dir: &Path, bytes: u64) -> Result<Self> {
        Self::with_policy(dir, bytes, Policy::default())
    }

    /// A tier that evicts by this policy, each slot size by itself.
    pub fn with_policy(dir: &Path, bytes: u64, policy: Policy) -> Result<Self> {
        let arena = Arc::new(Arena::create(dir, bytes)?);
        Ok(Self {
            arena,
            catalog: Mutex::new(Catalog::new(bytes, policy)),
            journal: Journal::default(),
            moved: Condvar::new(),
        })
    }

    /// From now on tenants have shares, by these weights: nobody's block leaves for another tenant's while its own holds
    /// no more than its share of what is taken. Before anything is stored.
    pub fn share(&self, weights: TenantWeights) {
        self.catalog.lock().share(weights);
    }

    /// These blocks, and what is stored behind them, are this tenant's if they are stored now. Forgotten after some
    /// hundreds of thousands of others.
    pub fn claim(&self, namespace: NamespaceId, blocks: &[Digest], tenant: &str) {
        self.catalog.lock().claim(namespace, blocks, tenant);
    }

    /// What tenants hold, in bytes of their slots: all that ever held something, nobody under no name. Empty where they
    /// have no shares.
    pub fn held_by_tenant(&self) -> Vec<(String, u64)> {
        self.catalog.lock().held_by_tenant()
    }

    /// The memory of the slots.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    fn block(&self, slot: Slot) -> Result<(Digest, Arc<Layout>)> {
        let catalog = self.catalog.lock();
        let (namespace, digest) = catalog.block(slot).ok_or(Error::NotFilled)?;
        Ok((digest, catalog.layout(namespace).clone()))
    }

    fn verified(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        let (digest, layout) = self.block(slot)?;
        if self.is_coming(slot) {
            return Err(Error::NotFilled);
        }
        let corrupt = |what| Error::Corrupt { digest, what };
        let checksums = slot::checksums(&self.arena, slot.0, &layout, &digest)
            .ok_or_else(|| corrupt("header"))?;
        let wanted = &layout.segments()[segments.clone()];
        if out.len() != wanted.iter().map(|segment| segment.bytes).sum::<usize>() {
            return Err(Error::Invalid(
                "the buffer does not have the segments' size".into(),
            ));
        }
        let mut rest = out;
        for (segment, expected) in wanted.iter().zip(&checksums[segments]) {
            let (this, next) = rest.split_at_mut(segment.bytes);
            if self.arena.get(slot.0 + segment.offset as u64, this) != *expected {
                return Err(corrupt("segment"));
            }
            rest = next;
        }
        Ok(())
    }
}

impl Tier for HostTier {
    fn kind(&self) -> Option<kvmesh_core::Tier> {
        Some(kvmesh_core::Tier::Host)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            retains: true,
            mapped: true,
            durable: false,
        }
    }

    fn open(&self, namespace: &Namespace) -> Result<NamespaceId> {
        self.catalog.lock().open(namespace)
    }

    fn layout(&self, namespace: NamespaceId) -> Arc<Layout> {
        self.catalog.lock().layout(namespace).clone()
    }

    fn hint(&self, namespace: NamespaceId, blocks: &[BlockHash], hints: Hints) {
        self.catalog.lock().hint(namespace, blocks, hints);
    }

    fn lookup(&self, namespace: NamespaceId, chain: &[Digest]) -> usize {
        self.catalog.lock().lookup(namespace, chain)
    }

    fn reserve(
        &self,
        namespace: NamespaceId,
        parent: Option<&Digest>,
        chain: &[Digest],
    ) -> Vec<Room> {
        let rooms = self
            .catalog
            .lock()
            .reserve(&self.journal, namespace, parent, chain);
        self.disprove(&rooms);
        rooms
    }

    fn fill(&self, slot: Slot, segments: &[&[u8]]) -> Result<()> {
        let (digest, layout) = self.block(slot)?;
        if !self.catalog.lock().is_reserved(slot) {
            return Err(Error::NotFilled);
        }
        let fits = segments
            .iter()
            .map(|bytes| bytes.len())
            .eq(layout.segments().iter().map(|s| s.bytes));
        if !fits {
            return Err(Error::Invalid(
                "the segments are not the namespace's".into(),
            ));
        }
        slot::fill(&self.arena, slot.0, &layout, &digest, |number, at| {
            self.arena.put(at, segments[number])
        });
        Ok(())
    }

    fn seal(&self, slot: Slot) -> Result<()> {
        let (digest, layout) = self.block(slot)?;
        let whole = slot::checksums(&self.arena, slot.0, &layout, &digest).is_some();
        if whole && self.catalog.lock().seal(slot) {
            Ok(())
        } else {
            Err(Error::NotFilled)
        }
    }

    fn abandon(&self, slots: &[Slot]) {
        let mut catalog = self.catalog.lock();
        for &slot in slots {
            catalog.abandon(slot);
        }
    }

    fn register(&self, slots: &[Slot]) {
        self.catalog.lock().register(&self.journal, slots);
    }

    fn lease(&self, namespace: NamespaceId, chain: &[Digest], limit: usize) -> Vec<Slot> {
        self.catalog.lock().lease(namespace, chain, limit)
    }

    fn walk(&self, after: Option<Slot>, limit: usize) -> Vec<Held> {
        self.catalog.lock().walk(after, limit)
    }

    fn hold(&self, namespace: NamespaceId, digest: &Digest) -> Option<Slot> {
        self.catalog.lock().hold_block(namespace, digest)
    }

    fn digests(&self, namespace: NamespaceId, chain: &[BlockHash]) -> Vec<Digest> {
        self.catalog.lock().digests(namespace, chain)
    }

    fn read(&self, slot: Slot, segments: Range<usize>, out: &mut [u8]) -> Result<()> {
        let read = self.verified(slot, segments, out);
        if matches!(read, Err(Error::Corrupt { .. })) {
            self.discard(slot);
        }
        read
    }

    fn release(&self, slots: &[Slot]) {
        let mut catalog = self.catalog.lock();
        for &slot in slots {
            catalog.release(slot);
        }
    }

    fn discard(&self, slot: Slot) {
        self.catalog.lock().discard(&self.journal, slot);
    }

    fn evict(&self, namespace: NamespaceId, blocks: &[Digest]) -> usize {
        self.catalog.lock().evict(&self.journal, namespace, blocks)
    }

    fn flush(&self) -> usize {
        self.catalog.lock().flush(&self.journal)
    }

    fn stats(&self) -> Stats {
        self.catalog.lock().stats()
    }

    fn journal(&self) -> Option<&Journal> {
        Some(&self.journal)
    }

    fn snapshot(&self) -> (Vec<Change>, Vec<Change>) {
        let catalog = self.catalog.lock();
        // Changes are noted under the catalog's lock: these two belong together.
        (self.journal.drain(), catalog.chains())
    }
}
