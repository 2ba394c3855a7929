//! What placements carry for those who ask why.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::HashSet;

use common::{Bench, chain, immediate, planned, prompt};
use kvmesh_select::{Candidate, Config, Placed, PolicyName, Prices, Request, Role};

const KEPT: usize = 16;

fn pair(candidate: &Candidate) -> (u64, u64) {
    (candidate.prefill.raw(), candidate.decode.raw())
}

fn keeping(config: Config) -> Config {
    Config {
        explained: KEPT,
        ..config
    }
}

/// Workers of all roles, some with prompts and streams.
fn busy(config: Config, roles: &[Role], requests: u64) -> Bench {
    let (mut bench, ids) = Bench::new(config, roles);
    for (at, &id) in ids.iter().enumerate() {
        bench.table.0.insert(id, chain(1, at as u64 % 7));
    }
    for id in 1..=requests {
        let placed = bench.place(prompt(id, &chain(100 + id, 3 + id % 5)));
        if let Some(placed) = placed.filter(|_| id % 3 > 0) {
            bench.progress(placed.lease, true, 1);
        }
    }
    bench
}

fn select(bench: &mut Bench, request: &Request) -> Placed {
    bench
        .with(|selector, context| selector.select(request, context))
        .unwrap()
}

#[test]
fn pairs_with_every_decode_worker_are_explained() {
    for config in [immediate(), planned()] {
        let roles = [
            Role::Prefill,
            Role::Prefill,
            Role::Decode,
            Role::Decode,
            Role::Decode,
            Role::Aggregated,
        ];
        let (mut bench, ids) = Bench::new(config, &roles);
        // One decode worker generates already, as the only one that its request could go to.
        let mut first = prompt(1, &chain(1, 10));
        first.exclude.extend([ids[2], ids[3], ids[5]]);
        let first = bench.place(first).unwrap();
        bench.progress(first.lease, true, 1);
        // Beside it a token takes longer, in a fuller pool, and so do its own.
        let prices = Prices::default();
        let held = bench.selector.slots(ids[4]).blocks as f64;
        let share = |blocks: f64| blocks / 10_000.0;
        let alone = prices.token * bench.step_ms(1.0, share(10.0));
        let both = bench.step_ms(2.0, share(held + 10.0));
        let more = both - bench.step_ms(1.0, share(held));
        let beside = prices.token * (both + more);
        let mut request = prompt(2, &chain(2, 10));
        request.explain = true;
        let placed = bench.place(request).unwrap();
        let pairs: HashSet<_> = placed.candidates.iter().map(pair).collect();
        let mut possible: HashSet<_> = [(5, 5)].into();
        possible.extend([0, 1].iter().flat_map(|&p| [2, 3, 4].map(|d| (p, d))));
        let possible = possible
            .iter()
            .map(|&(p, d)| (ids[p].raw(), ids[d].raw()))
            .collect();
        assert_eq!((placed.candidates.len(), &pairs), (7, &possible));
        assert!(placed.costs.is_sorted());
        for (candidate, cost) in placed.candidates.iter().zip(&placed.costs) {
            assert!((candidate.terms.total() - cost).abs() < 1e-9);
            let decode = if candidate.decode == ids[4] {
                beside
            } else {
                alone
            };
            assert!(
                (candidate.terms.decode - decode).abs() < 1e-9,
                "{candidate:?}"
            );
            assert_eq!(candidate.terms.transfer > 0.0, candidate.decode != ids[5]);
        }
        assert!(placed.candidates.contains(&placed.winner));
        assert_ne!(placed.winner.decode, ids[4]);
    }
}

#[test]
fn the_cheapest_are_kept_at_any_size() {
    let mut roles = vec![Role::Aggregated; 20];
    roles.extend([Role::Prefill; 10]);
    roles.extend([Role::Decode; 10]);
    for config in [immediate(), planned()] {
        let mut bench = busy(keeping(config), &roles, 25);
        let request = prompt(1000, &chain(1, 12));
        // The same ties fall the same way.
        let chance = bench.chance.clone();
        let all = select(&mut bench, &request);
        bench.chance = chance;
        assert_eq!(all.candidates.len(), 20 + 10 * 10);
        assert!(all.costs.is_sorted() && all.costs[0] < all.costs[119]);
        let placed = bench.place(request).unwrap();
        assert_eq!(placed.candidates, all.candidates[..KEPT]);
        assert_eq!(placed.costs, all.costs[..KEPT]);
    }
}

#[test]
fn the_winner_is_always_there() {
    let roles = [Role::Aggregated; 40];
    let mut outside = 0;
    for policy in PolicyName::ALL {
        let config = Config {
            policy,
            temperature: 0.5,
            ..keeping(immediate())
        };
        let mut bench = busy(config, &roles, 60);
        for id in 1000..1020 {
            let cheapest = select(&mut bench, &prompt(id, &chain(id, 5))).candidates;
            let placed = bench.place(prompt(id, &chain(id, 5))).unwrap();
            assert_eq!((placed.candidates.len(), placed.costs.len()), (KEPT, KEPT));
            assert!(placed.candidates.contains(&placed.winner), "{policy}");
            outside += usize::from(!cheapest[..KEPT].iter().any(|one| one.is_as(&placed.winner)));
        }
    }
    assert!(outside > 0, "chance never chose one of the others");
}

#[test]
fn what_is_kept_changes_no_decision() {
    let roles = [
        Role::Aggregated,
        Role::Prefill,
        Role::Prefill,
        Role::Decode,
        Role::Decode,
    ];
    let run = |config: Config, explain: bool| {
        let (mut bench, _) = Bench::new(config, &roles);
        for id in 1..=200 {
            // Now and then many at once, which a plan holds and puts into one pass.
            bench.now += if id % 20 < 8 { 0.0 } else { 40.0 };
            let mut request = prompt(id, &chain(id % 9, 1 + id % 30));
            request.explain = explain;
            bench.submit(request).unwrap();
            bench.tick();
            let done = bench.placed.len().checked_sub(3);
            if let Some(lease) = done.map(|at| bench.placed[at].lease) {
                bench.progress(lease, true, 1);
                bench.end(lease);
            }
        }
        let placed = bench.placed.into_iter();
        placed
            .map(|placed| (placed.request, placed.lease, placed.winner))
            .collect::<Vec<_>>()
    };
    for config in [immediate(), planned()] {
        let bare = run(config.clone(), false);
        assert!(bare.len() > 150);
        assert_eq!(run(keeping(config.clone()), false), bare);
        assert_eq!(run(config, true), bare);
    }
}
