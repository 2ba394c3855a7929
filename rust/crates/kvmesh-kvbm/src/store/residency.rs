//! Where blocks are, and wishes of where they should be.

use std::time::{Duration, Instant};

use kvmesh_core::{BlockHash, Digest, Tier as Kind};

use super::Store;
use crate::namespace::Namespace;
use crate::tiers::{NamespaceId, Tier};

/// Blocks of a chain that were wished to the host tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prefetched {
    /// Leading blocks that are there already.
    pub here: usize,
    /// Blocks behind them that come up, if there is time.
    pub coming: usize,
}

impl Store {
    /// The namespaces of a model, of all where it is empty. Those that were found in lower tiers and no engine has asked
    /// for yet are opened.
    pub fn namespaces_of(&self, model: &str) -> Vec<NamespaceId> {
        let named = |name: &Namespace| model.is_empty() || name.model == model;
        let mut news = self.nvme().map_or(Vec::new(), |nvme| nvme.namespaces());
        news.extend(self.objects().map_or(Vec::new(), |tier| tier.namespaces()));
        if !news.is_empty() {
            let opened: Vec<_> = self
                .shared
                .all()
                .into_iter()
                .map(|open| open.name.clone())
                .collect();
            for name in (news.into_iter()).filter(|name| named(name) && !opened.contains(name)) {
                // The host tier may be too small for such blocks; then they stay where they are.
                let _ = self.open(&name);
            }
        }
        (self.shared.all().iter().enumerate())
            .filter(|(_, open)| named(&open.name))
            .map(|(id, _)| NamespaceId(id as u32))
            .collect()
    }

    /// A namespace's fields.
    pub fn name_of(&self, namespace: NamespaceId) -> Namespace {
        self.shared.open(namespace).name.clone()
    }

    /// The leading blocks of a chain that are in some tier, by their hashes.
    pub fn digests(&self, namespace: NamespaceId, hashes: &[BlockHash]) -> Vec<Digest> {
        let mut found = self.host.digests(namespace, hashes);
        let below = self.shared.open(namespace).below;
        let (Some(nvme), Some(below)) = (self.nvme(), below) else {
            return found;
        };
        while found.len() < hashes.len() {
            let before = found.len();
            found.extend(nvme.digests(below, &hashes[before..]));
            found.extend(self.host.digests(namespace, &hashes[found.len()..]));
            if found.len() == before {
                break;
            }
        }
        found
    }

    /// Begins to read those leading blocks of a chain that are in lower tiers into the host tier, behind everything
    /// engines wait for; what has not begun `within` a time is given up.
    pub fn prefetch(
        &self,
        namespace: NamespaceId,
        chain: &[Digest],
        within: Duration,
    ) -> Prefetched {
        let here = self.host.leading(namespace, chain);
        let coming = match (&self.lower, Instant::now().checked_add(within)) {
            (Some(lower), Some(until)) if here < chain.len() => {
                let until = Some(until);
                let found = (lower.promoter).wish(&self.shared, namespace, chain, here, until);
                found - here
            }
            _ => 0,
        };
        Prefetched { here, coming }
    }

    /// The tiers that have a block, from the top. Counts as no look-up.
    pub fn places_of(&self, namespace: NamespaceId, digest: &Digest) -> Vec<Kind> {
        let mut places = Vec::new();
        if self.host.holds(namespace, digest) {
            places.push(Kind::Host);
        }
        let below = self.shared.open(namespace).below;
        if let (Some(nvme), Some(below)) = (self.nvme(), below)
            && nvme.holds(below, digest)
        {
            places.push(Kind::Nvme);
        }
        let remote = self.shared.open(namespace).remote;
        if let (Some(tier), Some(remote)) = (self.objects(), remote)
            && tier.holds(remote, digest)
        {
            places.push(Kind::Network);
        }
        places
    }

    /// Drops blocks of a tier that are not in use; how many.
    pub fn evict(&self, tier: Kind, namespace: NamespaceId, blocks: &[Digest]) -> usize {
        let Some(number) = self.shared.translate(Kind::Host, namespace, tier) else {
            return 0;
        };
        let tiers = self.tiers();
        let found = tiers.iter().find(|other| other.kind() == Some(tier));
        found.map_or(0, |tier| tier.evict(number, blocks))
    }
}
