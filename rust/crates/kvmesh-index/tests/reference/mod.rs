//! The index's meaning in sets and loops: no runs, no masks, no cleverness. The truth in every test.

use std::collections::{BTreeMap, BTreeSet};

use kvmesh_core::Tier;

#[derive(Clone, Debug)]
pub struct Holder {
    pub engine: bool,
    pub node: Option<String>,
}

/// Holders by a name of the test's choosing, and the set that is the whole state.
#[derive(Default)]
pub struct Reference {
    pub holders: BTreeMap<u32, Holder>,
    pub held: BTreeSet<(u32, Tier, u64)>,
}

impl Reference {
    pub fn store(&mut self, holder: u32, hashes: &[u64], tier: Tier) {
        self.held
            .extend(hashes.iter().map(|&hash| (holder, tier, hash)));
    }

    pub fn remove(&mut self, holder: u32, hashes: &[u64], tier: Tier) {
        for &hash in hashes {
            self.held.remove(&(holder, tier, hash));
        }
    }

    pub fn clear(&mut self, holder: u32, tier: Option<Tier>) {
        self.held
            .retain(|&(h, t, _)| h != holder || tier.is_some_and(|tier| tier != t));
    }

    pub fn drop_holder(&mut self, holder: u32) {
        self.clear(holder, None);
        self.holders.remove(&holder);
    }

    pub fn tier(&self, holder: u32, tier: Tier) -> Vec<u64> {
        let of = |&&(h, t, _): &&(u32, Tier, u64)| h == holder && t == tier;
        self.held
            .iter()
            .filter(of)
            .map(|&(_, _, hash)| hash)
            .collect()
    }

    /// Does the engine see the block in this very tier?
    fn sees(&self, engine: u32, tier: Tier, hash: u64) -> bool {
        self.holders.iter().any(|(&holder, at)| {
            let visible = match tier {
                Tier::Device => holder == engine,
                Tier::Host | Tier::Nvme => {
                    at.node.is_some() && at.node == self.holders[&engine].node
                }
                Tier::Network => true,
            };
            visible && self.held.contains(&(holder, tier, hash))
        })
    }

    /// Depths of every engine that sees the first block.
    pub fn matches(&self, hashes: &[u64]) -> BTreeMap<u32, [u32; 4]> {
        let mut answer = BTreeMap::new();
        for (&engine, holder) in &self.holders {
            if !holder.engine {
                continue;
            }
            let depths = Tier::ALL.map(|slowest| {
                let reach = |hash: &&u64| {
                    Tier::ALL
                        .into_iter()
                        .any(|tier| tier <= slowest && self.sees(engine, tier, **hash))
                };
                hashes.iter().take_while(reach).count() as u32
            });
            if depths[3] > 0 {
                answer.insert(engine, depths);
            }
        }
        answer
    }
}
