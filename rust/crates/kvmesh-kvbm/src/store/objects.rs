//! Object storage, for callers of a store.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmesh_core::{BlockHash, Digest};

use super::archive::Archivist;
use super::recall::Recaller;
use super::{Archived, Recalled, Settings, Shared, Store};
use crate::error::Result;
use crate::tiers::{Health, NamespaceId, NvmeTier, ObjectSettings, ObjectTier, Tier};

/// The tier, and what writes to and reads from it.
pub(super) struct Objects {
    pub(super) tier: Arc<ObjectTier>,
    pub(super) archivist: Archivist,
    pub(super) recaller: Arc<Recaller>,
}

impl Objects {
    pub(super) fn start(
        shared: &Arc<Shared>,
        nvme: Option<&Arc<NvmeTier>>,
        objects: &ObjectSettings,
        settings: &Settings,
    ) -> Result<Self> {
        let tier = ObjectTier::new(objects, settings.policy)?;
        Ok(Self {
            archivist: Archivist::start(shared, &tier, settings.host_bytes)?,
            recaller: Recaller::new(shared, nvme, &tier, settings.host_bytes),
            tier,
        })
    }

    pub(super) fn stop(&self) {
        self.archivist.stop();
        self.tier.stop();
    }
}

impl Store {
    /// The object tier.
    pub fn objects(&self) -> Option<&Arc<ObjectTier>> {
        self.objects.as_ref().map(|objects| &objects.tier)
    }

    /// What went to object storage, and what came from there, and whether it works.
    pub fn object_flow(&self) -> Option<(Archived, Recalled, Health)> {
        let objects = self.objects.as_ref()?;
        Some((
            objects.archivist.archived(),
            objects.recaller.recalled(),
            objects.tier.health(),
        ))
    }

    /// Begins to read what memory and disk lack of a chain from object storage, in the time given. Blocks it is not known
    /// to have are asked for there: `known` are the digests of the leading ones. Engines may lease what has begun to come,
    /// and wait.
    pub fn recall(
        &self,
        namespace: NamespaceId,
        known: &[Digest],
        chain: &[BlockHash],
        within: Duration,
    ) {
        let (Some(objects), Some(until)) = (&self.objects, Instant::now().checked_add(within))
        else {
            return;
        };
        self.expire_pins();
        let there = objects.recaller.leading(namespace, known);
        let mut known = known[..there].to_vec();
        if let Some(remote) = self.shared.open(namespace).remote {
            let more = objects
                .tier
                .digests(remote, &chain[known.len().min(chain.len())..]);
            known.extend(more);
        }
        if known.len() < chain.len() {
            let chain = chain.to_vec();
            (objects.recaller).want_named(namespace, known, chain, until);
        } else {
            objects.recaller.want(namespace, known, until);
        }
    }
}
