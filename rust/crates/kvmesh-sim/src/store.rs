//! A node's KVBM store under simulation: which blocks its host and nvme tiers hold, by the store's own eviction
//! policies.
//!
//! A prompt's blocks go to the store when they have been computed. The nvme tier takes what the host tier takes, so that
//! both see whole chains.

use kvmesh_core::Tier;
use kvmesh_eviction::{BlockId, Hints, Key, Policy, PrefixCache, Tick, Use};
use rustc_hash::FxHashMap;

/// What a node has below its engines' devices.
#[derive(Clone, Copy, Debug)]
pub struct StoreShape {
    /// Engines that share a store; workers are put on nodes in the order of their numbers.
    pub workers: usize,
    /// Blocks of the host tier.
    pub host: u32,
    /// Blocks of the nvme tier; 0: none.
    pub nvme: u32,
    /// Which blocks leave a full tier.
    pub policy: Policy,
}

/// Blocks that a tier has taken in, or that have left it.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Which tier.
    pub tier: Tier,
    /// Whether they are there now.
    pub held: bool,
    /// Of those taken in, in the order of their chain.
    pub hashes: Vec<u64>,
    /// The block before the first of them.
    pub parent: Option<u64>,
}

/// A node's store.
pub struct Store {
    tiers: Vec<(Tier, PrefixCache)>,
    /// Every block ever seen has a number of its own.
    numbers: FxHashMap<u64, BlockId>,
    hashes: Vec<u64>,
    tick: Tick,
    evicted: Vec<BlockId>,
}

impl Store {
    /// An empty store.
    pub fn new(shape: &StoreShape) -> Self {
        let tiers = [(Tier::Host, shape.host), (Tier::Nvme, shape.nvme)];
        let tier = |(tier, blocks): (Tier, u32)| {
            let cache = PrefixCache::new(shape.policy.build(), blocks as usize);
            (blocks > 0).then_some((tier, cache))
        };
        Self {
            tiers: tiers.into_iter().filter_map(tier).collect(),
            numbers: FxHashMap::default(),
            hashes: Vec::new(),
            tick: 0,
            evicted: Vec::new(),
        }
    }

    /// How many leading blocks of `chain` it holds, by the fastest tier that has each: host, nvme.
    pub fn leading(&self, chain: &[u64]) -> [u32; 2] {
        let mut found = [0; 2];
        for hash in chain {
            let Some(&block) = self.numbers.get(hash) else {
                break;
            };
            let fastest = self.tiers.iter().find(|(_, cache)| cache.holds(block));
            match fastest {
                Some((Tier::Host, _)) => found[0] += 1,
                Some(_) => found[1] += 1,
                None => break,
            }
        }
        found
    }

    /// Takes in what it wants of a prompt's whole blocks, or notes that they were of use, at `now` milliseconds.
    pub fn touch(&mut self, now: f64, chain: &[u64]) -> Vec<Change> {
        let mut changes = Vec::new();
        self.tick += 1;
        let mut parent = None;
        for (at, &hash) in chain.iter().enumerate() {
            let block = self.number(hash);
            let of = Use {
                key: Key(hash),
                parent: parent.map(|(hash, _)| Key(hash)),
                tail: at + 1 == chain.len(),
                tick: self.tick,
                seconds: now / 1e3,
                hints: Hints::default(),
            };
            let before = parent.map(|(_, block)| block);
            for (tier, cache) in &mut self.tiers {
                let found = cache.touch(block, before, &of, &mut self.evicted);
                for gone in self.evicted.drain(..) {
                    note(&mut changes, *tier, self.hashes[gone.0 as usize], None);
                }
                if !found && cache.holds(block) {
                    note(
                        &mut changes,
                        *tier,
                        hash,
                        Some(parent.map(|(hash, _)| hash)),
                    );
                }
            }
            parent = Some((hash, block));
        }
        changes
    }

    fn number(&mut self, hash: u64) -> BlockId {
        *self.numbers.entry(hash).or_insert_with(|| {
            self.hashes.push(hash);
            BlockId(self.hashes.len() as u32 - 1)
        })
    }
}

/// Adds a block to the changes, with those of its kind where no other change came between; `taken`: what it follows.
fn note(changes: &mut Vec<Change>, tier: Tier, hash: u64, taken: Option<Option<u64>>) {
    let held = taken.is_some();
    let last = changes.iter().rposition(|change| change.tier == tier);
    if let Some(last) = last
        .map(|at| &mut changes[at])
        .filter(|last| last.held == held)
    {
        last.hashes.push(hash);
        return;
    }
    changes.push(Change {
        tier,
        held,
        hashes: vec![hash],
        parent: taken.flatten(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(host: u32, nvme: u32) -> Store {
        Store::new(&StoreShape {
            workers: 1,
            host,
            nvme,
            policy: Policy::Lru,
        })
    }

    fn change(tier: Tier, held: bool, hashes: &[u64], parent: Option<u64>) -> Change {
        Change {
            tier,
            held,
            hashes: hashes.to_vec(),
            parent,
        }
    }

    #[test]
    fn what_leaves_the_host_tier_is_found_in_the_next() {
        let mut store = store(2, 4);
        let taken = |tier, hashes: &[u64]| change(tier, true, hashes, None);
        assert_eq!(
            store.touch(0.0, &[1, 2]),
            [taken(Tier::Host, &[1, 2]), taken(Tier::Nvme, &[1, 2])]
        );
        assert_eq!(store.leading(&[1, 2, 3]), [2, 0]);
        let changes = store.touch(1.0, &[3, 4]);
        assert!(changes.contains(&change(Tier::Host, false, &[2], None)));
        assert_eq!(store.leading(&[1, 2]), [0, 2]);
        assert_eq!(store.leading(&[3, 4]), [2, 0]);
        assert_eq!(store.leading(&[5]), [0, 0]);
    }

    #[test]
    fn changes_in_their_order_are_the_contents() {
        let mut store = store(8, 20);
        let mut held =
            [Tier::Host, Tier::Nvme].map(|tier| (tier, std::collections::BTreeSet::new()));
        for turn in 0..200_u64 {
            let chain: Vec<u64> = (0..1 + turn % 7)
                .map(|at| 1 + turn * turn % 11 * 10 + at)
                .collect();
            for change in store.touch(turn as f64, &chain) {
                let of_tier = |(tier, _): &&mut (Tier, _)| *tier == change.tier;
                let (_, held) = held.iter_mut().find(of_tier).unwrap();
                for hash in change.hashes {
                    assert!(if change.held {
                        held.insert(hash)
                    } else {
                        held.remove(&hash)
                    });
                }
            }
            for (tier, hashes) in &held {
                let (_, cache) = store.tiers.iter().find(|(of, _)| of == tier).unwrap();
                let truth = store
                    .numbers
                    .iter()
                    .filter(|&(_, &block)| cache.holds(block));
                assert_eq!(
                    truth
                        .map(|(&hash, _)| hash)
                        .collect::<std::collections::BTreeSet<_>>(),
                    *hashes
                );
            }
        }
    }
}
