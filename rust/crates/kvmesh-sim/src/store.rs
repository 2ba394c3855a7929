//! KVBM stores under simulation: which blocks a node's host and nvme tiers and the network tier of all nodes hold, by the
//! stores' own eviction policies.
//!
//! A prompt's blocks go to the stores when they have been computed. Each tier takes what the one above it takes, so that
//! all see whole chains.

use kvmesh_core::Tier;
use kvmesh_eviction::{BlockId, Hints, Key, Policy, PrefixCache, Tick, Use};
use rustc_hash::FxHashMap;

/// What there is below the engines' devices.
#[derive(Clone, Copy, Debug)]
pub struct StoreShape {
    /// Engines that share a store; workers are put on nodes in the order of their numbers.
    pub workers: usize,
    /// Blocks of the host tier.
    pub host: u32,
    /// Blocks of the nvme tier; 0: none.
    pub nvme: u32,
    /// Blocks of the network tier, which all nodes share; 0: none.
    pub network: u32,
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

/// A node's store, or that of the network.
pub struct Store {
    tiers: Vec<(Tier, PrefixCache)>,
    /// Every block ever seen has a number of its own.
    numbers: FxHashMap<u64, BlockId>,
    hashes: Vec<u64>,
    tick: Tick,
    evicted: Vec<BlockId>,
}

impl Store {
    /// An empty store of a node.
    pub fn of_node(shape: &StoreShape) -> Self {
        Self::new(
            shape.policy,
            &[(Tier::Host, shape.host), (Tier::Nvme, shape.nvme)],
        )
    }

    /// The empty store of the network.
    pub fn of_network(shape: &StoreShape) -> Self {
        Self::new(shape.policy, &[(Tier::Network, shape.network)])
    }

    fn new(policy: Policy, tiers: &[(Tier, u32)]) -> Self {
        let tier = |&(tier, blocks): &(Tier, u32)| {
            let cache = PrefixCache::new(policy.build(), blocks as usize);
            (blocks > 0).then_some((tier, cache))
        };
        Self {
            tiers: tiers.iter().filter_map(tier).collect(),
            numbers: FxHashMap::default(),
            hashes: Vec::new(),
            tick: 0,
            evicted: Vec::new(),
        }
    }

    /// The fastest tier that has a block.
    fn tier_of(&self, hash: u64) -> Option<Tier> {
        let block = *self.numbers.get(&hash)?;
        let fastest = self.tiers.iter().find(|(_, cache)| cache.holds(block));
        fastest.map(|&(tier, _)| tier)
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

/// What an engine finds below its device: its node's store, and the network's.
#[derive(Clone, Copy, Default)]
pub struct Below<'a>(pub [Option<&'a Store>; 2]);

impl Below<'_> {
    /// How many leading blocks of `chain` are there, by the fastest tier that has each: host, nvme, network.
    pub fn leading(&self, chain: &[u64]) -> [u32; 3] {
        let mut found = [0; 3];
        for &hash in chain {
            let mut stores = self.0.iter().flatten();
            match stores.find_map(|store| store.tier_of(hash)) {
                Some(Tier::Host) => found[0] += 1,
                Some(Tier::Nvme) => found[1] += 1,
                Some(_) => found[2] += 1,
                None => break,
            }
        }
        found
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

    fn shape(host: u32, nvme: u32, network: u32) -> StoreShape {
        StoreShape {
            workers: 1,
            host,
            nvme,
            network,
            policy: Policy::Lru,
        }
    }

    fn store(host: u32, nvme: u32) -> Store {
        Store::of_node(&shape(host, nvme, 0))
    }

    fn leading(node: &Store, chain: &[u64]) -> [u32; 3] {
        Below([Some(node), None]).leading(chain)
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
        assert_eq!(leading(&store, &[1, 2, 3]), [2, 0, 0]);
        let changes = store.touch(1.0, &[3, 4]);
        assert!(changes.contains(&change(Tier::Host, false, &[2], None)));
        assert_eq!(leading(&store, &[1, 2]), [0, 2, 0]);
        assert_eq!(leading(&store, &[3, 4]), [2, 0, 0]);
        assert_eq!(leading(&store, &[5]), [0; 3]);
    }

    #[test]
    fn what_a_node_lacks_is_found_in_the_network() {
        let shape = shape(2, 0, 8);
        let (mut here, mut there) = (Store::of_node(&shape), Store::of_node(&shape));
        let mut network = Store::of_network(&shape);
        for (node, chain) in [(&mut there, [1, 2, 3]), (&mut here, [1, 2, 4])] {
            node.touch(0.0, &chain[..2]);
            network.touch(0.0, &chain);
        }
        let below = Below([Some(&here), Some(&network)]);
        assert_eq!(below.leading(&[1, 2, 3, 9]), [2, 0, 1]);
        assert_eq!(below.leading(&[9]), [0; 3]);
        let alone = Below([None, Some(&network)]);
        assert_eq!(alone.leading(&[1, 2, 4]), [0, 0, 3]);
        assert_eq!(Below::default().leading(&[1]), [0; 3]);
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
