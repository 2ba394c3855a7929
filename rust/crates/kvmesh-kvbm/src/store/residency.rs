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

/// Blocks of lower tiers that are worth being read up, the longest unused first.
#[derive(Debug, Default)]
pub struct Warming {
    chains: Vec<(NamespaceId, Option<Digest>, Vec<Digest>)>,
    /// Blocks that would not fit.
    pub left: u64,
}

/// What a step of warming did, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Warmed {
    /// They can be read in the host tier now.
    pub brought: u64,
    /// They did not come: their tier failed, or they were evicted meanwhile.
    pub failed: u64,
    /// To be brought still.
    pub to_come: u64,
}

impl Store {
    /// The namespaces of a model, of all where it is empty. Those that were found on the disk and no engine has asked
    /// for yet are opened.
    pub fn namespaces_of(&self, model: &str) -> Vec<NamespaceId> {
        let named = |name: &Namespace| model.is_empty() || name.model == model;
        if let Some(nvme) = self.nvme() {
            let opened: Vec<_> = self
                .shared
                .all()
                .into_iter()
                .map(|open| open.name.clone())
                .collect();
            let news = nvme.namespaces().into_iter();
            for name in news.filter(|name| named(name) && !opened.contains(name)) {
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

    /// Which blocks of a model (all: empty) lower tiers could bring up into vacant room: those used last.
    pub fn warming(&self, model: &str) -> Warming {
        let wanted = self.namespaces_of(model);
        let Some(nvme) = self.nvme() else {
            return Warming::default();
        };
        let stats = self.host.stats();
        let mut room = stats.capacity_bytes.saturating_sub(stats.used_bytes);
        let mut warming = Warming::default();
        let mut full = false;
        let mut blocks = Vec::new();
        for (below, digest, parent) in nvme.by_use().into_iter().rev() {
            let host = self.shared.translate(Kind::Nvme, below, Kind::Host);
            let Some(namespace) = host.filter(|namespace| wanted.contains(namespace)) else {
                continue;
            };
            if self.host.holds(namespace, &digest) {
                continue;
            }
            let bytes = self.shared.open(namespace).layout.slot_bytes() as u64;
            full |= bytes > room;
            if full {
                warming.left += 1;
                continue;
            }
            room -= bytes;
            blocks.push((namespace, parent, digest));
        }
        for (namespace, parent, digest) in blocks.into_iter().rev() {
            match warming.chains.last_mut() {
                Some((of, _, chain)) if *of == namespace && parent == chain.last().copied() => {
                    chain.push(digest);
                }
                _ => warming.chains.push((namespace, parent, vec![digest])),
            }
        }
        // The next step takes from the end.
        warming.chains.reverse();
        warming
    }

    /// Brings about so many blocks of a plan, or more: chains stay whole. Blocks.
    pub fn warm(&self, warming: &mut Warming, blocks: usize) -> Warmed {
        let mut warmed = Warmed::default();
        while warmed.brought + warmed.failed < blocks as u64 {
            let Some((namespace, parent, chain)) = warming.chains.pop() else {
                break;
            };
            if let Some(lower) = &self.lower {
                (lower.promoter).bring(namespace, parent.as_ref(), &chain);
            }
            let here = chain
                .iter()
                .filter(|digest| self.host.holds(namespace, digest));
            let brought = here.count() as u64;
            warmed.brought += brought;
            warmed.failed += chain.len() as u64 - brought;
        }
        let left = warming.chains.iter().map(|(.., chain)| chain.len() as u64);
        warmed.to_come = left.sum();
        warmed
    }
}
