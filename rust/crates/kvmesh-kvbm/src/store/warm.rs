//! Vacant memory is filled ahead of traffic, with what was used last: from the disk, or from object storage.

use std::sync::Arc;
use std::time::Duration;

use kvmesh_core::{Digest, Tier as Kind};

use super::Store;
use super::recall::Recaller;
use crate::error::{Error, Result};
use crate::tiers::{NamespaceId, ObjectSettings, ObjectTier, Tier};

/// How long a chain may take that comes from object storage.
const CHAIN_TIME: Duration = Duration::from_secs(60);

/// A run of a chain: the block before the first, and the blocks.
pub type Run = (NamespaceId, Option<Digest>, Vec<Digest>);

/// Blocks that are worth being read up, the longest unused first.
#[derive(Default)]
pub struct Warming {
    chains: Vec<Run>,
    /// None: they are on the disk.
    objects: Option<Source>,
    /// Blocks that would not fit.
    pub left: u64,
}

/// Object storage, this store's own or one that is read for this once.
struct Source {
    recaller: Arc<Recaller>,
    own: Option<Arc<ObjectTier>>,
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(tier) = &self.own {
            tier.stop();
        }
    }
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
    /// Which blocks of a model (all: empty) the disk could bring up into vacant room: those used last.
    pub fn warming(&self, model: &str) -> Warming {
        let wanted = self.namespaces_of(model);
        let Some(nvme) = self.nvme() else {
            return Warming::default();
        };
        let blocks = nvme.by_use().into_iter();
        let here = blocks.filter_map(|(below, digest, parent)| {
            let host = self.shared.translate(Kind::Nvme, below, Kind::Host)?;
            Some((host, digest, parent))
        });
        self.plan(&wanted, here.collect())
    }

    /// The same of object storage, which may be another than this store's own: those used last here, else written last.
    /// Fails where it is not to be had. Blocks.
    pub fn warming_from(&self, model: &str, objects: &ObjectSettings) -> Result<Warming> {
        let own = (self.objects.as_ref())
            .filter(|own| own.tier.settings().url == objects.url && own.tier.working().is_ok());
        let (tier, source) = match own {
            Some(own) => {
                let recaller = own.recaller.clone();
                let source = Source {
                    recaller,
                    own: None,
                };
                (own.tier.clone(), source)
            }
            None => {
                let settings = ObjectSettings {
                    writable: false,
                    ..objects.clone()
                };
                let tier = ObjectTier::new(&settings, Default::default())?;
                let host_bytes = self.host.stats().capacity_bytes;
                let recaller = Recaller::new(&self.shared, self.nvme(), &tier, host_bytes);
                let own = Some(tier.clone());
                (tier, Source { recaller, own })
            }
        };
        if let Some(why) = tier.health().problem {
            return Err(Error::Storage {
                at: objects.url.clone(),
                why,
            });
        }
        let names = tier.namespaces();
        for name in &names {
            if model.is_empty() || name.model == model {
                // The host tier may be too small for such blocks; then they stay where they are.
                let _ = self.open(name);
            }
        }
        let wanted = self.namespaces_of(model);
        let host: Vec<Option<NamespaceId>> = (names.iter())
            .map(|name| (wanted.iter().copied()).find(|&id| self.name_of(id) == *name))
            .collect();
        let blocks = tier.by_use().into_iter();
        let here = blocks.filter_map(|(remote, digest, parent)| {
            let host = host.get(remote.0 as usize).copied().flatten()?;
            Some((host, digest, parent))
        });
        Ok(Warming {
            objects: Some(source),
            ..self.plan(&wanted, here.collect())
        })
    }

    /// What memory and disk have of a model (all: empty), as runs of chains, those used last first, at most so many
    /// blocks.
    pub fn hottest(&self, model: &str, limit: usize) -> Vec<Run> {
        let wanted = self.namespaces_of(model);
        let mut blocks = Vec::new();
        if let Some(nvme) = self.nvme() {
            for (below, digest, parent) in nvme.by_use() {
                let host = self.shared.translate(Kind::Nvme, below, Kind::Host);
                let host = host.filter(|&host| !self.host.holds(host, &digest));
                blocks.extend(host.map(|host| (host, digest, parent)));
            }
        }
        blocks.extend(self.host.by_use());
        blocks.retain(|(namespace, ..)| wanted.contains(namespace));
        let surplus = blocks.len().saturating_sub(limit);
        let mut runs = runs_of(blocks.into_iter().skip(surplus));
        runs.reverse();
        runs
    }

    /// Blocks of a namespace that fit into vacant memory.
    pub fn room(&self, namespace: NamespaceId) -> u64 {
        let stats = self.host.stats();
        let vacant = stats.capacity_bytes.saturating_sub(stats.used_bytes);
        vacant / self.shared.open(namespace).layout.slot_bytes() as u64
    }

    /// Brings about so many blocks of a plan, or more: chains stay whole. Blocks.
    pub fn warm(&self, warming: &mut Warming, blocks: usize) -> Warmed {
        let mut warmed = Warmed::default();
        while warmed.brought + warmed.failed < blocks as u64 {
            let Some((namespace, parent, chain)) = warming.chains.pop() else {
                break;
            };
            match (&warming.objects, &self.lower) {
                (Some(source), _) => {
                    (source.recaller).bring(namespace, parent, &chain, CHAIN_TIME);
                }
                (None, Some(lower)) => (lower.promoter).bring(namespace, parent.as_ref(), &chain),
                (None, None) => {}
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

    /// Blocks that are not here and fit into vacant room, of those in the order of their use.
    fn plan(
        &self,
        wanted: &[NamespaceId],
        by_use: Vec<(NamespaceId, Digest, Option<Digest>)>,
    ) -> Warming {
        let stats = self.host.stats();
        let mut room = stats.capacity_bytes.saturating_sub(stats.used_bytes);
        let mut warming = Warming::default();
        let mut full = false;
        let mut blocks = Vec::new();
        for (namespace, digest, parent) in by_use.into_iter().rev() {
            if !wanted.contains(&namespace) || self.host.holds(namespace, &digest) {
                continue;
            }
            let bytes = self.shared.open(namespace).layout.slot_bytes() as u64;
            full |= bytes > room;
            if full {
                warming.left += 1;
                continue;
            }
            room -= bytes;
            blocks.push((namespace, digest, parent));
        }
        warming.chains = runs_of(blocks.into_iter().rev());
        // The next step takes from the end.
        warming.chains.reverse();
        warming
    }
}

/// Blocks that follow each other, in one.
fn runs_of(blocks: impl Iterator<Item = (NamespaceId, Digest, Option<Digest>)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (namespace, digest, parent) in blocks {
        match runs.last_mut() {
            Some((of, _, run)) if *of == namespace && parent == run.last().copied() => {
                run.push(digest);
            }
            _ => runs.push((namespace, parent, vec![digest])),
        }
    }
    runs
}
