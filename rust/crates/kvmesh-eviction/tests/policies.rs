//! What every eviction policy must do, and what the default must reach beside LRU and GDSF.

#[path = "../examples/eviction/optimum.rs"]
mod optimum;
#[path = "../examples/eviction/synthetic.rs"]
mod synthetic;

use std::collections::{BTreeMap, BTreeSet};

use kvmesh_eviction::simulate::{Request, simulate};
use kvmesh_eviction::{BlockId, EvictionPolicy, Hints, Key, Policy, PrefixCache, Tick, Use};
use optimum::Optimum;
use proptest::prelude::*;
use synthetic::{BLOCK_TOKENS, Random, TRACES};

/// The most that the default may stay below the better of LRU and GDSF, in tokens hit a token.
const GUARD: f64 = 0.003;

fn at(key: u64, tick: Tick) -> Use {
    Use {
        key: Key(key),
        parent: None,
        tail: false,
        tick,
        seconds: tick as f64,
        hints: Hints::default(),
    }
}

/// What a program of a cache's owner does next.
#[derive(Debug, Clone)]
enum Step {
    /// Uses a chain from its first block on; blocks that are not there are stored if the policy wants them.
    Use { chain: u64, length: u64 },
    /// Keeps a block, whatever the policy says: it is read, or pinned.
    Hold { pick: usize },
    /// Lets go of it.
    Free { pick: usize },
    /// Drops a block that nobody holds, with or without blocks that follow it.
    Drop { pick: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..9_u64, 1..7_u64).prop_map(|(chain, length)| Step::Use { chain, length }),
        2 => (0..64_usize).prop_map(|pick| Step::Hold { pick }),
        2 => (0..64_usize).prop_map(|pick| Step::Free { pick }),
        1 => (0..64_usize).prop_map(|pick| Step::Drop { pick }),
    ];
    prop::collection::vec(step, 1..200)
}

/// A cache that knows of each block what follows it and who holds it, and tells its policy.
struct Model {
    policy: Box<dyn EvictionPolicy>,
    /// Key to number, parent and holders.
    blocks: BTreeMap<u64, (BlockId, Option<u64>, u32)>,
    offered: BTreeSet<u64>,
    vacant: Vec<BlockId>,
}

impl Model {
    const CAPACITY: usize = 12;

    fn new(policy: Policy) -> Self {
        Self {
            policy: policy.build(),
            blocks: BTreeMap::new(),
            offered: BTreeSet::new(),
            vacant: (0..Self::CAPACITY as u32).map(BlockId).collect(),
        }
    }

    fn is_followed(&self, key: u64) -> bool {
        self.blocks
            .values()
            .any(|&(_, parent, _)| parent == Some(key))
    }

    /// Brings the policy's view of what may leave up to date.
    fn settle(&mut self) {
        let free: BTreeSet<u64> = (self.blocks.iter())
            .filter(|&(&key, &(_, _, holders))| holders == 0 && !self.is_followed(key))
            .map(|(&key, _)| key)
            .collect();
        for key in self.offered.difference(&free) {
            self.policy.withdraw(self.blocks[key].0);
        }
        for key in free.difference(&self.offered) {
            self.policy.offer(self.blocks[key].0);
        }
        self.offered = free;
    }

    fn drop_block(&mut self, key: u64, for_room: bool) {
        let (block, ..) = self.blocks.remove(&key).expect("a block that is there");
        if self.offered.remove(&key) {
            self.policy.withdraw(block);
        }
        self.policy.removed(block, for_room);
        self.vacant.push(block);
        self.settle();
    }

    fn evict(&mut self) -> Result<bool, TestCaseError> {
        let Some(victim) = self.policy.victim() else {
            prop_assert!(self.offered.is_empty(), "no victim though one is offered");
            return Ok(false);
        };
        let key = (self.blocks.iter())
            .find(|(_, known)| known.0 == victim)
            .map(|(&key, _)| key);
        let key = key.filter(|key| self.offered.contains(key));
        prop_assert!(key.is_some(), "the victim is in use, followed or not there");
        self.drop_block(key.expect("checked"), true);
        Ok(true)
    }

    fn use_chain(&mut self, chain: u64, length: u64, tick: Tick) -> Result<(), TestCaseError> {
        let mut parent = None;
        let mut refused = false;
        for place in 0..length {
            // Chains share their first two blocks by threes.
            let key = if place < 2 { chain % 3 } else { 10 + chain } * 100 + place;
            let mut at = at(key, tick);
            at.parent = parent.map(Key);
            at.tail = place + 1 == length;
            if let Some(&(block, ..)) = self.blocks.get(&key) {
                if self.offered.remove(&key) {
                    self.policy.withdraw(block);
                }
                self.policy.used(block, &at);
            } else if refused {
                self.policy.admits(&at);
            } else {
                // The block before it may not leave for it.
                let held = parent.filter(|parent| self.offered.remove(parent));
                if let Some(held) = held {
                    self.policy.withdraw(self.blocks[&held].0);
                    self.blocks.get_mut(&held).expect("there").2 += 1;
                }
                let room = !self.vacant.is_empty() || (self.policy.admits(&at) && self.evict()?);
                if let Some(held) = held {
                    self.blocks.get_mut(&held).expect("held").2 -= 1;
                }
                if room {
                    let block = self.vacant.pop().expect("room");
                    self.policy.used(block, &at);
                    self.blocks.insert(key, (block, parent, 0));
                } else {
                    refused = true;
                }
            }
            self.settle();
            parent = Some(key);
        }
        Ok(())
    }

    fn step(&mut self, step: Step, tick: Tick) -> Result<(), TestCaseError> {
        let picked = |pick: usize| self.blocks.keys().nth(pick).copied();
        match step {
            Step::Use { chain, length } => self.use_chain(chain, length, tick)?,
            Step::Hold { pick } => {
                if let Some(key) = picked(pick) {
                    self.blocks.get_mut(&key).expect("there").2 += 1;
                    self.settle();
                }
            }
            Step::Free { pick } => {
                if let Some(key) = picked(pick) {
                    let holders = &mut self.blocks.get_mut(&key).expect("there").2;
                    *holders = holders.saturating_sub(1);
                    self.settle();
                }
            }
            Step::Drop { pick } => {
                if let Some(key) = picked(pick).filter(|key| self.blocks[key].2 == 0) {
                    self.drop_block(key, false);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn only_what_is_offered_leaves(steps in steps(), policy in prop::sample::select(&Policy::ALL[..])) {
        let mut model = Model::new(policy);
        for (number, step) in steps.into_iter().enumerate() {
            model.step(step, number as Tick + 1)?;
        }
        // Whatever is held no more leaves in the end, each chain from its tail.
        for (_, _, holders) in model.blocks.values_mut() {
            *holders = 0;
        }
        model.settle();
        while model.evict()? {}
        prop_assert!(model.blocks.is_empty());
    }
}

/// The evictions of a run, in order.
fn evictions(policy: Policy, trace: &[Request], capacity: usize) -> Vec<BlockId> {
    let mut cache = PrefixCache::new(policy.build(), capacity);
    let mut evicted = Vec::new();
    let mut ids: BTreeMap<Key, BlockId> = BTreeMap::new();
    for (number, request) in trace.iter().enumerate() {
        let mut parent = None;
        for &key in &request.chain {
            let next = BlockId(ids.len() as u32);
            let block = *ids.entry(key).or_insert(next);
            cache.touch(block, parent, &at(key.0, number as Tick + 1), &mut evicted);
            assert!(cache.len() <= capacity);
            parent = Some(block);
        }
    }
    evicted
}

#[test]
fn equal_inputs_give_equal_evictions() {
    let trace = made_up("phases", 200);
    for policy in Policy::ALL {
        let once = evictions(policy, &trace, 100);
        assert!(once.len() > 1000, "{policy:?}");
        assert_eq!(once, evictions(policy, &trace, 100), "{policy:?}");
    }
}

#[test]
fn policies_are_found_by_name_and_others_are_refused_with_advice() {
    for policy in Policy::ALL {
        assert_eq!(policy.name().parse(), Ok(policy));
    }
    let refused = "fifo".parse::<Policy>().unwrap_err();
    assert!(refused.contains("\"fifo\"") && refused.contains("lru"));
}

/// The order in which blocks of one use pattern leave: each key's uses are ticks.
fn order(policy: Policy, uses: &[u64]) -> Vec<u64> {
    let mut policy = policy.build();
    for (tick, &key) in uses.iter().enumerate() {
        let block = BlockId(key as u32);
        policy.withdraw(block);
        policy.used(block, &at(key, tick as Tick + 1));
        policy.offer(block);
    }
    std::iter::from_fn(|| {
        let victim = policy.victim()?;
        policy.withdraw(victim);
        policy.removed(victim, true);
        Some(u64::from(victim.0))
    })
    .collect()
}

#[test]
fn each_policy_has_its_order() {
    let uses = [1, 1, 1, 2, 3, 3, 4];
    assert_eq!(order(Policy::Lru, &uses), [1, 2, 3, 4]);
    assert_eq!(order(Policy::Gdsf, &uses), [2, 4, 3, 1]);
    // The small queue first, and of it what was used more than once after it was stored goes to the main one.
    assert_eq!(order(Policy::S3Fifo, &uses), [2, 3, 4, 1]);
    // Nothing learned: by the last use.
    assert_eq!(order(Policy::ClassIndex, &uses), [1, 2, 3, 4]);
    assert_eq!(order(Policy::Default, &uses), [1, 2, 3, 4]);
}

fn made_up(name: &str, scale: u64) -> Vec<Request> {
    let trace = TRACES.iter().find(|trace| trace.0 == name);
    trace.expect("a made-up trace").1(scale)
}

fn rate(trace: &[Request], policy: Box<dyn EvictionPolicy>, capacity: usize) -> f64 {
    simulate(trace, BLOCK_TOKENS, policy, capacity, trace.len() / 2).hit_rate()
}

#[test]
fn the_default_is_never_far_below_lru_and_gdsf() {
    let mut below = Vec::new();
    for (name, make) in TRACES {
        let trace = make(600);
        for capacity in [200, 600, 900] {
            let of = |policy: Policy| rate(&trace, policy.build(), capacity);
            let (ours, lru, gdsf) = (of(Policy::Default), of(Policy::Lru), of(Policy::Gdsf));
            if ours < lru.max(gdsf) - GUARD {
                below.push(format!(
                    "{name} at {capacity}: {ours:.4}, {lru:.4}, {gdsf:.4}"
                ));
            }
        }
    }
    assert!(below.is_empty(), "ours, LRU, GDSF: {below:#?}");
}

#[test]
fn the_others_outvote_the_class_index_where_it_fails() {
    let trace = made_up("retired", 1000);
    let of = |policy: Policy| rate(&trace, policy.build(), 1500);
    let lru = of(Policy::Lru);
    assert!(of(Policy::ClassIndex) < lru - 0.02);
    assert!(of(Policy::Default) > lru - GUARD);
}

#[test]
fn no_policy_is_above_the_optimum() {
    for (name, make) in TRACES {
        let trace = make(200);
        let of = |policy| simulate(&trace, BLOCK_TOKENS, policy, 100, 0).hit_tokens;
        let optimum = of(Box::new(Optimum::new(&trace)));
        for policy in Policy::ALL {
            assert!(of(policy.build()) <= optimum, "{policy:?} on {name}");
        }
    }
}

#[test]
fn the_default_learns_what_neither_lru_nor_gdsf_know() {
    // A round somewhat longer than the cache: both never hit, and three quarters of it could be kept.
    let trace = made_up("loop", 1000);
    assert_eq!(rate(&trace, Policy::Lru.build(), 1000), 0.0);
    assert_eq!(rate(&trace, Policy::Gdsf.build(), 1000), 0.0);
    assert!(rate(&trace, Policy::Default.build(), 1000) > 0.75);
}

#[test]
fn hints_help_as_far_as_they_are_true() {
    let told = |accuracy: Option<u64>| {
        let mut trace = made_up("chat", 1000);
        let mut random = Random(9);
        let mut later = BTreeSet::new();
        for request in trace.iter_mut().rev() {
            let returns = request
                .chain
                .last()
                .is_some_and(|last| later.contains(last));
            later.extend(request.chain.iter().copied());
            request.hints.returns = accuracy.map(|percent| returns == random.chance(percent));
        }
        rate(&trace, Policy::Default.build(), 250)
    };
    let without = told(None);
    assert!(told(Some(90)) > without + 0.02);
    // Coin tosses: nothing to be learned from them, and little lost.
    assert!(told(Some(50)) > without - 0.01);
}
