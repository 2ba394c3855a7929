//! Leases and slots under random programs, against a recount from scratch; every lease ends once.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::HashMap;

use common::{Bench, immediate, prompt};
use kvmesh_select::{Config, Role, Slots, WorkerId};
use proptest::prelude::*;

const ROLES: [Role; 5] = [
    Role::Aggregated,
    Role::Aggregated,
    Role::Prefill,
    Role::Decode,
    Role::Decode,
];
const TTL: f64 = 1000.0;

#[derive(Clone, Debug)]
enum Step {
    Submit(Vec<u64>),
    Prefilled(usize),
    Output(usize, u32),
    End(usize),
    EndAgain(usize),
    Wait(f64),
    Replace(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u64..4, 0usize..40).prop_map(|(kind, count)| {
            Step::Submit((0..count as u64).map(|block| 1 + kind * 1000 + block).collect())
        }),
        3 => (0usize..64).prop_map(Step::Prefilled),
        3 => (0usize..64, 0u32..500).prop_map(|(at, tokens)| Step::Output(at, tokens)),
        2 => (0usize..64).prop_map(Step::End),
        1 => (0usize..64).prop_map(Step::EndAgain),
        1 => (1.0f64..700.0).prop_map(Step::Wait),
        1 => (0usize..5).prop_map(Step::Replace),
    ]
}

/// A lease as the test remembers it.
#[derive(Clone, Debug)]
struct Known {
    prefill: WorkerId,
    decode: WorkerId,
    prompt: u32,
    first: u64,
    uncached: u32,
    prefilled: bool,
    output: u32,
    heard: f64,
}

fn recount(leases: &HashMap<u64, Known>, worker: WorkerId) -> Slots {
    let mut slots = Slots::default();
    // Prompts of one kind begin alike and those of two do not: the longest of a kind holds all that the others do.
    let mut longest: HashMap<u64, u64> = HashMap::new();
    for known in leases.values() {
        let blocks = |tokens: u32| u64::from(tokens.div_ceil(common::BLOCK));
        if known.decode == worker && known.prefill == worker && known.first > 0 {
            let whole = u64::from(known.prompt / common::BLOCK);
            let most = longest.entry(known.first).or_default();
            slots.shared_blocks += whole.min(*most);
            *most = whole.max(*most);
        }
        if known.decode == worker {
            slots.requests += 1;
            slots.streams += u32::from(known.prefilled);
            slots.blocks += blocks(known.prompt + known.output);
            let cached = match known.prefill == worker {
                true => (known.prompt - known.uncached) / common::BLOCK,
                false => 0,
            };
            slots.own_blocks += blocks(known.prompt + known.output) - u64::from(cached);
        }
        if known.prefill == worker && !known.prefilled {
            slots.queued_tokens += u64::from(known.uncached);
            if known.decode != worker {
                slots.requests += 1;
                slots.blocks += blocks(known.prompt);
            }
        }
    }
    slots
}

fn run(config: Config, steps: Vec<Step>) {
    let (mut bench, mut ids) = Bench::new(
        Config {
            lease_ttl_ms: TTL,
            ..config
        },
        &ROLES,
    );
    let mut leases: HashMap<u64, Known> = HashMap::new();
    let mut firsts: HashMap<u64, u64> = HashMap::new();
    let (mut ended, mut names, mut requests, mut keys) = (Vec::new(), Vec::new(), 0, 100);
    let (mut placed_total, mut ended_total) = (0, 0);
    for step in steps {
        let pick = |at: usize, names: &Vec<u64>| names.get(at % names.len().max(1)).copied();
        match step {
            Step::Submit(blocks) => {
                requests += 1;
                firsts.insert(requests, blocks.first().copied().unwrap_or(0));
                bench.submit(prompt(requests, &blocks)).unwrap();
            }
            Step::Prefilled(at) => {
                if let Some(lease) = pick(at, &names) {
                    let known = leases.get_mut(&lease);
                    assert_eq!(bench.progress(lease, true, 0), known.is_some());
                    if let Some(known) = known {
                        (known.prefilled, known.heard) = (true, bench.now);
                    }
                }
            }
            Step::Output(at, tokens) => {
                if let Some(lease) = pick(at, &names) {
                    let known = leases.get_mut(&lease);
                    assert_eq!(bench.progress(lease, false, tokens), known.is_some());
                    if let Some(known) = known {
                        known.output = known.output.max(tokens);
                        known.prefilled |= tokens > 0;
                        known.heard = bench.now;
                    }
                }
            }
            Step::End(at) => {
                if let Some(lease) = pick(at, &names) {
                    let was = leases.remove(&lease).is_some();
                    ended_total += u64::from(was);
                    assert_eq!(bench.end(lease), was);
                    ended.push(lease);
                }
            }
            Step::EndAgain(at) => {
                if let Some(lease) = pick(at, &ended) {
                    assert!(!bench.end(lease));
                }
            }
            Step::Wait(ms) => {
                bench.now += ms;
                for lease in bench.tick() {
                    let known = leases.remove(&lease).expect("an expired lease was live");
                    assert!(known.heard + TTL <= bench.now);
                    ended_total += 1;
                    ended.push(lease);
                }
                assert!(leases.values().all(|known| known.heard + TTL > bench.now));
            }
            Step::Replace(at) => {
                bench.selector.remove_worker(ids[at]);
                keys += 1;
                ids[at] = bench.selector.add_worker(&common::spec(keys, ROLES[at]));
            }
        }
        for placed in std::mem::take(&mut bench.placed) {
            placed_total += 1;
            let cached: u32 = placed.winner.cached.iter().sum();
            let prompt = bench
                .selector
                .leases()
                .get(placed.lease)
                .unwrap()
                .prompt_tokens;
            names.push(placed.lease);
            let known = Known {
                prefill: placed.winner.prefill,
                decode: placed.winner.decode,
                prompt,
                first: firsts[&placed.request],
                uncached: prompt - cached,
                prefilled: false,
                output: 0,
                heard: bench.now,
            };
            assert!(leases.insert(placed.lease, known).is_none());
        }
        assert_eq!(bench.selector.leases().len(), leases.len());
        assert_eq!(placed_total, ended_total + leases.len() as u64);
        for &id in &ids {
            assert_eq!(bench.selector.slots(id), recount(&leases, id));
        }
        assert_eq!(bench.selector.leases().leaked(), 0);
    }
    // Nothing leaks: at the end all slots are free, whatever happened to the leases.
    for lease in leases.into_keys() {
        assert!(bench.end(lease));
    }
    while bench.selector.held() > 0 || !bench.placed.is_empty() {
        bench.now += 100.0;
        bench.tick();
        for placed in std::mem::take(&mut bench.placed) {
            assert!(bench.end(placed.lease));
        }
    }
    assert!(bench.selector.leases().is_empty());
    for &id in &ids {
        assert_eq!(bench.selector.slots(id), Slots::default());
    }
    bench.now += 10_000.0;
    bench.tick();
    assert_eq!(bench.selector.speculative(), 0);
}

proptest! {
    #[test]
    fn slots_are_exact_when_placed_at_once(steps in prop::collection::vec(step(), 1..120)) {
        run(immediate(), steps);
    }

    #[test]
    fn slots_are_exact_when_planned(steps in prop::collection::vec(step(), 1..120)) {
        run(Config::default(), steps);
    }
}
