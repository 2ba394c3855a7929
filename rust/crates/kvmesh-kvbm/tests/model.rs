//! Random operations on tiers against a model that knows only the contract.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvmesh_kvbm::block::{Filled, Lease, Reservation, Reserved, lease, register, reserve};
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::tiers::{HostTier, NvmeTier, Tier};
use kvmesh_kvbm::{Digest, Namespace};
use proptest::prelude::*;

const CHAINS: u8 = 6;
const LENGTH: usize = 9;
const SLOTS: u64 = 32;

#[derive(Debug, Clone)]
enum Step {
    Store {
        chain: u8,
        from: usize,
        to: usize,
        finish: bool,
    },
    Lease {
        chain: u8,
    },
    DropLease {
        index: usize,
    },
    DropPending,
    Evict {
        chain: u8,
    },
    Discard {
        index: usize,
    },
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let span = (0..LENGTH).prop_flat_map(|from| (Just(from), from..=LENGTH));
    let step = prop_oneof![
        6 => (0..CHAINS, span, any::<bool>())
            .prop_map(|(chain, (from, to), finish)| Step::Store { chain, from, to, finish }),
        4 => (0..CHAINS).prop_map(|chain| Step::Lease { chain }),
        3 => (0..8_usize).prop_map(|index| Step::DropLease { index }),
        1 => Just(Step::DropPending),
        1 => (0..CHAINS).prop_map(|chain| Step::Evict { chain }),
        1 => (0..8_usize).prop_map(|index| Step::Discard { index }),
        1 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..120)
}

fn blocks(chain: u8) -> Vec<Digest> {
    (0..LENGTH as u8)
        .map(|i| Digest::new(std::array::from_fn(|at| [chain, i][at % 2])))
        .collect()
}

fn fill(room: Reserved, digest: &Digest) -> Filled {
    room.fill(&[&[content(digest); 500]])
        .expect("a filled block")
}

fn content(digest: &Digest) -> u8 {
    digest.as_bytes()[0] ^ digest.as_bytes()[1]
}

struct World {
    tier: Arc<dyn Tier>,
    leases: Vec<(Vec<Digest>, Lease)>,
    pending: Vec<Reserved>,
}

fn run(steps: Vec<Step>, policy: Policy, on_disk: bool) -> Result<(), TestCaseError> {
    let dir = tempfile::tempdir().expect("a directory");
    let bytes = SLOTS * 4096;
    let tier: Arc<dyn Tier> = if on_disk {
        NvmeTier::new(dir.path(), bytes, policy)
    } else {
        Arc::new(HostTier::with_policy(dir.path(), bytes, policy).expect("a tier"))
    };
    let id = tier
        .open(&Namespace {
            model: "m".into(),
            revision: String::new(),
            dtype: String::new(),
            layout: String::new(),
            rank: 0,
            ranks: 1,
            segments: vec![500],
        })
        .expect("a namespace");
    let mut world = World {
        tier,
        leases: Vec::new(),
        pending: Vec::new(),
    };
    let tier = world.tier.clone();
    for step in steps {
        match step {
            Step::Store {
                chain,
                from,
                to,
                finish,
            } => {
                let all = blocks(chain);
                let parent = from.checked_sub(1).map(|before| &all[before]);
                let mut filled = Vec::new();
                for (reservation, digest) in reserve(&tier, id, parent, &all[from..to])
                    .into_iter()
                    .zip(&all[from..])
                {
                    if let Reservation::Room(room) = reservation {
                        if finish {
                            filled.push(fill(room, digest))
                        } else {
                            world.pending.push(room)
                        }
                    }
                }
                register(filled);
            }
            Step::Lease { chain } => {
                let all = blocks(chain);
                let expected = tier.lookup(id, &all);
                let leased = lease(&tier, id, &all, usize::MAX);
                prop_assert_eq!(leased.slots().len(), expected);
                world.leases.push((all, leased));
            }
            Step::DropLease { index } if index < world.leases.len() => {
                drop(world.leases.swap_remove(index))
            }
            Step::DropPending => world.pending.clear(),
            Step::Evict { chain } => drop(tier.evict(id, &blocks(chain))),
            Step::Discard { index } => {
                if let Some((_, leased)) = world
                    .leases
                    .get(index)
                    .filter(|(_, lease)| !lease.slots().is_empty())
                {
                    leased.discard(0);
                }
            }
            Step::Flush => drop(tier.flush()),
            Step::DropLease { .. } => {}
        }
        check(&world)?;
    }
    world.leases.clear();
    world.pending.clear();
    prop_assert_eq!(tier.stats().blocks_in_use, 0);
    tier.flush();
    let stats = tier.stats();
    prop_assert_eq!((stats.blocks, stats.used_bytes), (0, 0));
    let all: Vec<Digest> = (0..CHAINS).flat_map(blocks).take(SLOTS as usize).collect();
    let rooms = reserve(&tier, id, None, &all);
    prop_assert_eq!(
        rooms
            .iter()
            .filter(|room| matches!(room, Reservation::Room(_)))
            .count(),
        SLOTS as usize
    );
    Ok(())
}

fn check(world: &World) -> Result<(), TestCaseError> {
    // Slots in use are those held by someone, each once; what is leased reads as it was written.
    let mut held: BTreeSet<u64> = world.pending.iter().map(|room| room.slot().0).collect();
    prop_assert_eq!(held.len(), world.pending.len());
    let mut leased: BTreeMap<u64, Digest> = BTreeMap::new();
    for (chain, lease) in &world.leases {
        for (index, (slot, digest)) in lease.slots().iter().zip(chain).enumerate() {
            let mut out = [0; 500];
            lease.read(index, 0..1, &mut out).expect("a whole block");
            prop_assert_eq!(out, [content(digest); 500]);
            prop_assert_eq!(*leased.entry(slot.0).or_insert(*digest), *digest);
        }
    }
    prop_assert!(leased.keys().all(|slot| !held.contains(slot)));
    held.extend(leased.keys());
    let stats = world.tier.stats();
    prop_assert_eq!(stats.blocks_in_use, held.len() as u64);
    prop_assert!(stats.used_bytes <= stats.capacity_bytes);
    prop_assert!(stats.used_bytes >= stats.blocks * 4096);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_leaks_and_nothing_wrong_is_read(steps in steps(), policy in prop::sample::select(&Policy::ALL[..])) {
        run(steps, policy, false)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nor_on_a_disk(steps in steps(), policy in prop::sample::select(&Policy::ALL[..])) {
        run(steps, policy, true)?;
    }
}
