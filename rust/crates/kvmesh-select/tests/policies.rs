//! What every policy keeps to, and what each is for.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::{HashMap, HashSet};

use common::{Bench, immediate, prompt};
use kvmesh_select::{Admission, Config, NoWorker, PolicyName, Role, WorkerId, WorkerSpec};

const MIXED: [Role; 6] = [
    Role::Aggregated,
    Role::Aggregated,
    Role::Prefill,
    Role::Prefill,
    Role::Decode,
    Role::Decode,
];

fn config(policy: PolicyName) -> Config {
    Config {
        policy,
        admission: Admission::off(),
        ..immediate()
    }
}

#[test]
fn every_policy_places_where_it_may() {
    for policy in PolicyName::ALL {
        assert_eq!(policy.name().parse(), Ok(policy));
        let (mut bench, ids) = Bench::new(config(policy), &MIXED);
        let mut seen = HashSet::new();
        for id in 1..=60 {
            let mut request = prompt(id, &[id]);
            request.session = id;
            request.exclude.push(ids[0]);
            request.exclude.push(ids[4]);
            let placed = bench.place(request).expect("a placement");
            let pair = (placed.winner.prefill, placed.winner.decode);
            let allowed = [(ids[1], ids[1]), (ids[2], ids[5]), (ids[3], ids[5])];
            assert!(allowed.contains(&pair), "{policy}: {pair:?}");
            assert_ne!(placed.lease, 0);
            seen.insert(pair);
        }
        assert!(seen.len() > 1, "{policy} always chose alike");
    }
}

/// Workers of all roles, of which the last three offer what others do not.
fn able(policy: PolicyName) -> (Bench, Vec<WorkerId>) {
    let (mut bench, mut ids) = Bench::new(config(policy), &MIXED);
    for (key, role) in (10..).zip([Role::Aggregated, Role::Prefill, Role::Decode]) {
        let offers = vec![900 - key, SCHEMAS, ADAPTER];
        let spec = WorkerSpec {
            offers,
            ..common::spec(key, role)
        };
        ids.push(bench.selector.add_worker(&spec));
    }
    (bench, ids)
}

const SCHEMAS: u64 = 7;
const ADAPTER: u64 = 8;

#[test]
fn every_policy_keeps_to_workers_that_offer_what_is_needed() {
    for policy in PolicyName::ALL {
        let (mut bench, ids) = able(policy);
        let allowed = [(ids[6], ids[6]), (ids[7], ids[8])];
        let mut seen = HashSet::new();
        for id in 1..=60 {
            let mut request = prompt(id, &[id]);
            request.session = id;
            request.needs = [SCHEMAS, ADAPTER].into_iter().collect();
            let placed = bench.place(request).expect("a placement");
            let pair = (placed.winner.prefill, placed.winner.decode);
            assert!(allowed.contains(&pair), "{policy}: {pair:?}");
            seen.insert(pair);
        }
        assert_eq!(seen.len(), 2, "{policy} always chose alike");
        // Who needs nothing may go anywhere.
        let mut others = HashSet::new();
        for id in 101..=200 {
            let mut request = prompt(id, &[id]);
            request.session = id;
            others.insert(bench.place(request).expect("a placement").winner.prefill);
        }
        assert!(others.len() > 2, "{policy}: {others:?}");
        // One half that cannot is as good as none.
        for left_out in [vec![ids[6], ids[7]], vec![ids[6], ids[8]]] {
            let mut request = prompt(300, &[1]);
            request.needs.push(SCHEMAS);
            request.exclude = left_out.into();
            assert_eq!(bench.submit(request), Err(NoWorker), "{policy}");
        }
        let mut request = prompt(301, &[1]);
        request.needs.push(9);
        assert_eq!(bench.submit(request), Err(NoWorker), "{policy}");
    }
}

/// A request that waits is placed on a worker that joined later only if that offers what it needs.
#[test]
fn what_a_request_needs_holds_while_it_waits() {
    let config = Config {
        admission: Admission {
            backlog_ms: 1.0,
            ..Admission::default()
        },
        ..common::planned()
    };
    let (mut bench, _) = Bench::new(config, &[]);
    let able = |key: u64, offers: Vec<u64>| WorkerSpec {
        offers,
        ..common::spec(key, Role::Aggregated)
    };
    let first = bench.selector.add_worker(&able(0, vec![SCHEMAS]));
    for id in 1..=3 {
        let mut request = prompt(id, &[id; 40]);
        request.needs.push(SCHEMAS);
        bench.submit(request).unwrap();
    }
    bench.tick();
    let placed = |bench: &Bench| bench.placed.iter().map(|one| one.winner.prefill).collect();
    let before: Vec<WorkerId> = placed(&bench);
    assert_eq!(before, [first]);
    assert_eq!(bench.selector.held(), 2);
    bench.selector.add_worker(&able(1, Vec::new()));
    bench.now = 5.0;
    bench.tick();
    assert_eq!(bench.selector.held(), 2, "the new one cannot");
    let second = bench.selector.add_worker(&able(2, vec![SCHEMAS]));
    bench.tick();
    let after: Vec<WorkerId> = placed(&bench);
    assert_eq!(after, [first, second]);
}

#[test]
fn every_policy_says_when_nobody_can() {
    for policy in PolicyName::ALL {
        for roles in [&[][..], &[Role::Prefill], &[Role::Decode]] {
            let (mut bench, _) = Bench::new(config(policy), roles);
            assert_eq!(bench.submit(prompt(1, &[1])), Err(NoWorker), "{policy}");
            assert_eq!((bench.selector.held(), bench.placed.len()), (0, 0));
        }
    }
}

#[test]
fn every_policy_repeats_its_choices() {
    for policy in PolicyName::ALL {
        for temperature in [0.0, 0.5] {
            let run = || {
                let (mut bench, _) = Bench::new(
                    Config {
                        temperature,
                        ..config(policy)
                    },
                    &MIXED,
                );
                (1..=100)
                    .map(|id| bench.place(prompt(id, &[id % 7])).unwrap())
                    .collect::<Vec<_>>()
            };
            assert_eq!(run(), run(), "{policy}");
        }
    }
}

fn counts(
    bench: &mut Bench,
    requests: u64,
    session: impl Fn(u64) -> u64,
) -> HashMap<WorkerId, u64> {
    let mut counts = HashMap::new();
    for id in 1..=requests {
        let mut request = prompt(id, &[id]);
        request.session = session(id);
        let placed = bench.place(request).unwrap();
        *counts.entry(placed.winner.prefill).or_default() += 1;
    }
    counts
}

#[test]
fn round_robin_goes_in_turn_and_skips_who_left() {
    let (mut bench, ids) = Bench::new(config(PolicyName::RoundRobin), &[Role::Aggregated; 4]);
    let order = |bench: &mut Bench, from: u64| -> Vec<WorkerId> {
        (from..from + 8)
            .map(|id| bench.place(prompt(id, &[id])).unwrap().winner.prefill)
            .collect()
    };
    assert_eq!(order(&mut bench, 1), [&ids[..], &ids[..]].concat());
    bench.selector.remove_worker(ids[1]);
    let three = [ids[0], ids[2], ids[3]];
    assert_eq!(order(&mut bench, 100)[..6], [three, three].concat());
}

#[test]
fn load_policies_balance() {
    for policy in [PolicyName::LeastLoaded, PolicyName::PowerOfTwo] {
        let (mut bench, ids) = Bench::new(config(policy), &[Role::Aggregated; 8]);
        let counts = counts(&mut bench, 800, |_| 0);
        let most = ids
            .iter()
            .map(|id| counts.get(id).copied().unwrap_or(0))
            .max()
            .unwrap();
        // The power of two choices stays within a few of the mean; chance alone would not.
        assert!(most <= 104, "{policy}: {most}");
    }
    let (mut bench, _) = Bench::new(config(PolicyName::Random), &[Role::Aggregated; 8]);
    let counts = counts(&mut bench, 8000, |_| 0);
    assert!(
        counts.values().all(|&count| (900..1100).contains(&count)),
        "{counts:?}"
    );
}

#[test]
fn sessions_stick_and_few_move() {
    let (mut bench, ids) = Bench::new(config(PolicyName::Session), &[Role::Aggregated; 8]);
    let home = |bench: &mut Bench, id: u64, session: u64| {
        let mut request = prompt(id, &[id]);
        request.session = session;
        bench.place(request).unwrap().winner.prefill
    };
    let first: Vec<_> = (1..=400)
        .map(|session| home(&mut bench, session, session))
        .collect();
    let again: Vec<_> = (1..=400)
        .map(|session| home(&mut bench, 1000 + session, session))
        .collect();
    assert_eq!(first, again);
    let gone = ids[3];
    bench.selector.remove_worker(gone);
    for (at, &before) in first.iter().enumerate() {
        let session = at as u64 + 1;
        let after = home(&mut bench, 2000 + session, session);
        assert!(if before == gone {
            after != gone
        } else {
            after == before
        });
    }
    assert!(
        ids.iter()
            .all(|id| first.iter().filter(|home| *home == id).count() > 20)
    );
}

#[test]
fn a_request_can_name_its_policy() {
    let (mut bench, _) = Bench::new(config(PolicyName::Kv), &[Role::Aggregated; 4]);
    let mut request = prompt(1, &[1]);
    request.policy = Some(PolicyName::RoundRobin);
    assert!(bench.place(request).is_some());
    let error = "nearest".parse::<PolicyName>().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("unknown policy `nearest`; known: kv, round-robin")
    );
}

#[test]
fn temperature_sets_the_odds() {
    let softened = Config {
        temperature: 0.4,
        ..Config::default()
    };
    let (mut bench, ids) = Bench::new(softened, &[Role::Aggregated; 4]);
    let blocks: Vec<u64> = (1..=20).collect();
    for (held, &id) in [0, 3, 8, 15].into_iter().zip(&ids) {
        bench.table.0.insert(id, blocks[..held].to_vec());
    }
    // Made and not kept, so that all see the same costs.
    let mut won: HashMap<WorkerId, f64> = HashMap::new();
    let mut costs: HashMap<WorkerId, f64> = HashMap::new();
    let draws = 20_000;
    for _ in 0..draws {
        let request = prompt(1, &blocks);
        let placed = bench.with(|selector, context| selector.select(&request, context));
        let placed = placed.unwrap();
        *won.entry(placed.winner.prefill).or_default() += 1.0 / f64::from(draws);
        let candidates = placed.candidates.iter().map(|one| one.prefill);
        costs = candidates.zip(placed.costs).collect();
    }
    let lowest = costs.values().copied().fold(f64::INFINITY, f64::min);
    let highest = costs.values().copied().fold(0.0, f64::max);
    let odds = |cost: f64| (-(cost - lowest) / ((highest - lowest) * 0.4)).exp();
    let total: f64 = costs.values().map(|&cost| odds(cost)).sum();
    assert!(
        odds(highest) / total > 0.02,
        "all are likely enough to be seen"
    );
    for id in ids {
        let (seen, due) = (won[&id], odds(costs[&id]) / total);
        // Five standard deviations.
        let bound = 5.0 * (due * (1.0 - due) / f64::from(draws)).sqrt();
        assert!((seen - due).abs() < bound, "{id:?}: {seen}, {due}");
    }
    // And nothing is held for a plan.
    for id in 2..40 {
        bench.submit(prompt(id, &[id])).unwrap();
    }
    assert_eq!((bench.placed.len(), bench.selector.held()), (38, 0));
}
