//! What a tier that may go away holds while it is online.

use std::sync::Arc;

use kvmesh_core::Digest;
use rustc_hash::FxHashSet;

use super::Slot;
use super::catalog::Catalog;
use crate::error::{Error, Result};
use crate::eviction::Policy;
use crate::image::Layout;
use crate::journal::Journal;
use crate::namespace::Namespace;

/// Bits of a slot that are its byte offset; those above number the times the tier came online, so that what was handed
/// out before it went away means nothing afterwards.
const OFFSET_BITS: u32 = 48;

/// The number of the present time online.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Epoch(u16);

impl Epoch {
    /// The slot as callers know it.
    pub(super) fn outside(self, slot: Slot) -> Slot {
        Slot(slot.0 | u64::from(self.0) << OFFSET_BITS)
    }
}

pub(super) struct Contents {
    pub(super) catalog: Catalog,
    pub(super) epoch: Epoch,
    pub(super) online: bool,
    /// Reserved slots whose block has been written.
    pub(super) filled: FxHashSet<Slot>,
}

impl Contents {
    /// Nothing, offline.
    pub(super) fn nothing(bytes: u64, policy: Policy) -> Self {
        Self {
            catalog: Catalog::recorded(bytes, policy),
            epoch: Epoch::default(),
            online: false,
            filled: FxHashSet::default(),
        }
    }

    /// The slot's offset; None if it is of another time.
    pub(super) fn inside(&self, slot: Slot) -> Option<Slot> {
        let offset = Slot(slot.0 & ((1 << OFFSET_BITS) - 1));
        (self.epoch.outside(offset) == slot).then_some(offset)
    }

    /// The block a slot is for. Fails with `NotFilled` where it is for none.
    pub(super) fn block(&self, slot: Slot) -> Result<(Digest, Arc<Layout>)> {
        let slot = self.inside(slot).ok_or(Error::NotFilled)?;
        let (namespace, digest) = self.catalog.block(slot).ok_or(Error::NotFilled)?;
        Ok((digest, self.catalog.layout(namespace).clone()))
    }

    /// The same of a slot that its owner may write.
    pub(super) fn reserved(&self, slot: Slot) -> Result<(Digest, Arc<Layout>)> {
        let inside = self.inside(slot);
        if inside.is_some_and(|slot| self.catalog.is_reserved(slot)) {
            self.block(slot)
        } else {
            Err(Error::NotFilled)
        }
    }

    /// Puts another catalog in place, whose namespaces have the same numbers and which counts on.
    pub(super) fn replace(&mut self, mut catalog: Catalog, journal: &Journal, online: bool) {
        self.catalog.renounce_all(journal);
        catalog.announce_all(journal);
        catalog.count_on_from(&self.catalog.stats());
        self.catalog = catalog;
        self.epoch = Epoch(self.epoch.0.wrapping_add(1));
        self.filled.clear();
        self.online = online;
    }

    /// A catalog with the same namespaces and no block.
    pub(super) fn emptied(&self, bytes: u64, policy: Policy) -> Result<Catalog> {
        let mut catalog = Catalog::recorded(bytes, policy);
        for namespace in self.namespaces() {
            catalog.open(&namespace)?;
        }
        Ok(catalog)
    }

    /// The open namespaces, by their numbers.
    pub(super) fn namespaces(&self) -> Vec<Namespace> {
        self.catalog.known_namespaces().cloned().collect()
    }
}
