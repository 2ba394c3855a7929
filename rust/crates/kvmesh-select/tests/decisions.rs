//! Decisions checked by hand, and what `kv` must never do: herd.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::HashMap;

use common::{Bench, chain, immediate, planned, prompt};
use kvmesh_select::{Config, Prices, Role, WorkerId};

/// Near enough for rates that were fitted.
fn about(actual: f64, expected: f64) -> bool {
    (actual - expected).abs() <= 0.02 * expected.abs() + 0.5
}

#[test]
fn terms_are_what_they_say() {
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated; 2]);
    bench.table.0.insert(ids[1], chain(1, 10));
    // 20 blocks of 64 tokens, 10 of them on the second worker.
    let placed = bench.place(prompt(1, &chain(1, 20))).unwrap();
    assert_eq!(placed.winner.prefill, ids[1]);
    assert_eq!(placed.winner.cached, [640, 0, 0, 0]);
    let terms = placed.winner.terms;
    assert!(about(terms.prefill, 10.0 + 64.0), "{terms:?}");
    let own = bench.step_ms(1.0, 20.0 / 10_000.0);
    assert!(
        about(terms.decode, Prices::default().token * own),
        "{terms:?}"
    );
    assert_eq!(
        (terms.queue, terms.onboard, terms.transfer, terms.evict),
        (0.0, 0.0, 0.0, 0.0)
    );
    assert_eq!(terms.total(), terms.values().iter().sum());
    // 30 ms later 44 ms of it are left.
    bench.now = 30.0;
    let placed = bench.place(prompt(2, &chain(1, 20))).unwrap();
    assert_eq!(
        placed.winner.prefill, ids[1],
        "sharing the prefix under way is cheaper"
    );
    assert!(
        about(placed.winner.terms.queue, 44.0),
        "{:?}",
        placed.winner.terms
    );
    assert!(
        about(placed.winner.terms.prefill, 10.0 + 6.4),
        "{:?}",
        placed.winner.terms
    );
}

#[test]
fn a_long_queue_outweighs_a_short_prefix() {
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated; 2]);
    bench.table.0.insert(ids[0], chain(1, 4));
    let mut long = prompt(1, &chain(2, 60));
    long.exclude.push(ids[1]);
    assert_eq!(bench.place(long).unwrap().winner.prefill, ids[0]);
    assert_eq!(
        bench
            .place(prompt(2, &chain(1, 20)))
            .unwrap()
            .winner
            .prefill,
        ids[1]
    );
}

#[test]
fn splitting_is_decided_by_cost() {
    let roles = [Role::Aggregated, Role::Prefill, Role::Decode];
    let (mut bench, ids) = Bench::new(immediate(), &roles);
    // Alike and idle, the aggregated worker saves the transfer.
    let first = bench.place(prompt(1, &chain(1, 60))).unwrap();
    assert_eq!(
        (first.winner.prefill, first.winner.decode),
        (ids[0], ids[0])
    );
    // Behind 400 ms of prefill, a long prompt is split; one that is cached there waits less than it would transfer.
    let second = bench.place(prompt(2, &chain(2, 60))).unwrap();
    assert_eq!(
        (second.winner.prefill, second.winner.decode),
        (ids[1], ids[2])
    );
    assert!(about(second.winner.terms.transfer, 1.0 + 0.01 * 3840.0));
    bench.now = 390.0;
    bench.table.0.insert(ids[0], chain(3, 30));
    let third = bench.place(prompt(3, &chain(3, 30))).unwrap();
    assert_eq!(third.winner.prefill, ids[0]);
}

#[test]
fn slower_tiers_cost_onboarding() {
    struct Tiers(WorkerId, WorkerId);
    impl kvmesh_select::Lookup for Tiers {
        fn matches(&mut self, _: &[u64], found: &mut Vec<kvmesh_select::Found>) {
            found.push(kvmesh_select::Found {
                worker: self.0,
                depths: [0, 0, 0, 20],
            });
            found.push(kvmesh_select::Found {
                worker: self.1,
                depths: [5, 20, 20, 20],
            });
        }
    }
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated; 3]);
    let mut tiers = Tiers(ids[0], ids[1]);
    let Bench {
        selector,
        chance,
        placed,
        refused,
        ..
    } = &mut bench;
    let mut context = kvmesh_select::Context {
        now: 0.0,
        lookup: &mut tiers,
        chance,
        placed,
        refused,
    };
    selector
        .submit(prompt(1, &chain(1, 30)), &mut context)
        .unwrap();
    assert_eq!(
        placed[0].winner.prefill, ids[1],
        "host is nearer than network"
    );
    assert_eq!(placed[0].winner.cached, [320, 960, 0, 0]);
    assert!(placed[0].winner.terms.onboard > 0.0);
}

fn shares(bench: &Bench) -> HashMap<WorkerId, usize> {
    let mut shares = HashMap::new();
    for placed in &bench.placed {
        *shares.entry(placed.winner.prefill).or_default() += 1;
    }
    shares
}

#[test]
fn different_prompts_at_once_spread() {
    let (mut bench, _) = Bench::new(immediate(), &[Role::Aggregated; 8]);
    for id in 1..=64 {
        bench.submit(prompt(id, &chain(id, 20))).unwrap();
    }
    let shares = shares(&bench);
    assert!(
        shares.values().all(|&count| count == 8) && shares.len() == 8,
        "{shares:?}"
    );
}

#[test]
fn equal_prompts_at_once_share_and_spread() {
    let (mut bench, _) = Bench::new(immediate(), &[Role::Aggregated; 8]);
    for id in 1..=64 {
        bench.submit(prompt(id, &chain(1, 60))).unwrap();
    }
    // The first computes 394 ms, those behind it some 16 ms each: about 20 fit before computing the prompt elsewhere too
    // is as cheap. All on one worker would be the herd, one each would compute it 64 times.
    let shares = shares(&bench);
    let most = shares.values().copied().max().unwrap();
    assert!((2..=8).contains(&shares.len()) && most <= 40, "{shares:?}");
    let computed: usize = bench
        .placed
        .iter()
        .filter(|placed| placed.winner.cached[0] == 0)
        .count();
    assert_eq!(
        computed,
        shares.len(),
        "each worker computes the prompt once"
    );
}

#[test]
fn equal_prompts_are_planned_to_share() {
    let (mut bench, _) = Bench::new(planned(), &[Role::Aggregated; 4]);
    for id in 1..=12 {
        bench.submit(prompt(id, &chain(1, 60))).unwrap();
    }
    let mut computed = 0;
    let mut done = 0;
    while done < 12 {
        let placed = std::mem::take(&mut bench.placed);
        assert!(!placed.is_empty(), "held although a worker is free");
        for one in placed {
            done += 1;
            computed += usize::from(one.winner.cached[0] == 0);
            bench.now += one.winner.terms.prefill;
            bench
                .table
                .0
                .entry(one.winner.prefill)
                .or_insert(chain(1, 60));
            bench.progress(one.lease, true, 0);
        }
    }
    assert!(computed <= 4, "{computed}");
    assert_eq!(bench.selector.held(), 0);
}

#[test]
fn a_plan_lets_short_prompts_go_first() {
    let (mut bench, ids) = Bench::new(planned(), &[Role::Aggregated]);
    let first = bench.place(prompt(1, &chain(1, 60))).unwrap();
    for (id, blocks) in [(2, 60), (3, 2), (4, 20)] {
        assert!(
            bench.place(prompt(id, &chain(id, blocks))).is_none(),
            "the worker is busy"
        );
    }
    assert_eq!(bench.selector.held(), 3);
    assert!(bench.selector.wakes_at(bench.now).is_some());
    bench.now = 394.0;
    bench.progress(first.lease, true, 0);
    let order = |bench: &Bench| {
        bench
            .placed
            .iter()
            .map(|placed| placed.request)
            .collect::<Vec<_>>()
    };
    assert_eq!(order(&bench)[1], 3);
    assert_eq!(bench.placed[1].held_ms, 394.0);
    for at in 1..3 {
        bench.now += 200.0;
        let lease = bench.placed[at].lease;
        bench.progress(lease, true, 0);
    }
    assert_eq!(order(&bench), [1, 3, 4, 2]);
    assert_eq!((bench.selector.held(), ids.len()), (0, 1));
}

#[test]
fn a_plan_fills_a_pass_when_that_saves_more_than_it_delays() {
    // A pass takes 10 ms, and 5 for the stream there; a token 0.1 ms. Of eight prompts of 64 tokens the seventh would delay
    // six by 6.4 ms to save 15 for itself and the last. Of long ones the second delays the first by 192 ms.
    for (blocks, together) in [(1, 6), (30, 1)] {
        let (mut bench, _) = Bench::new(planned(), &[Role::Aggregated]);
        let first = bench.place(prompt(1, &chain(1, 60))).unwrap();
        for id in 2..10 {
            bench.submit(prompt(id, &chain(id, blocks))).unwrap();
        }
        bench.now = 394.0;
        bench.progress(first.lease, true, 0);
        assert_eq!(bench.placed.len() - 1, together, "{blocks} blocks");
    }
}

#[test]
fn a_prompt_is_there_before_streams_take_another_step() {
    for (step_ms, ahead_ms) in [(5.0, 10.0), (100.0, 100.0)] {
        let (mut bench, _) = Bench::new(planned(), &[]);
        let mut spec = common::spec(1, Role::Aggregated);
        spec.probe.decode = [1, 10, 40].map(|n| (n, 0.0, step_ms)).to_vec();
        bench.selector.add_worker(&spec);
        let stream = bench.place(prompt(1, &chain(1, 1))).unwrap();
        bench.progress(stream.lease, true, 0);
        let long = bench.place(prompt(2, &chain(2, 60))).unwrap();
        assert!(bench.place(prompt(3, &chain(3, 60))).is_none());
        let computed = long.winner.terms.prefill;
        let due = bench.selector.wakes_at(bench.now).unwrap();
        assert!((computed - due - ahead_ms).abs() < 1.0, "{computed} {due}");
        bench.now = due + 0.01;
        bench.tick();
        assert_eq!(bench.placed.len(), 3);
    }
}

#[test]
fn a_held_request_can_be_withdrawn() {
    let (mut bench, _) = Bench::new(planned(), &[Role::Aggregated]);
    assert!(bench.place(prompt(1, &chain(1, 60))).is_some());
    assert!(bench.place(prompt(2, &chain(2, 60))).is_none());
    assert!(bench.selector.withdraw(2) && !bench.selector.withdraw(2));
    bench.now = 1e4;
    bench.tick();
    assert_eq!(bench.placed.len(), 1);
}

#[test]
fn a_plan_is_made_at_once_when_workers_join_and_leave() {
    let (mut bench, ids) = Bench::new(planned(), &[Role::Aggregated; 2]);
    bench.place(prompt(1, &chain(1, 50))).unwrap();
    bench.place(prompt(2, &chain(2, 50))).unwrap();
    assert!(bench.place(prompt(3, &chain(3, 50))).is_none());
    assert!(bench.selector.wakes_at(bench.now) > Some(bench.now));
    bench.selector.remove_worker(ids[0]);
    assert!(bench.selector.wakes_at(bench.now) <= Some(bench.now));
    bench.tick();
    assert!(
        bench.selector.wakes_at(bench.now) > Some(bench.now),
        "held on"
    );
    let joined = bench
        .selector
        .add_worker(&common::spec(9, Role::Aggregated));
    assert!(bench.selector.wakes_at(bench.now) <= Some(bench.now));
    bench.tick();
    assert_eq!(bench.placed[2].winner.prefill, joined);
    assert_eq!(bench.selector.wakes_at(bench.now), None);
}

#[test]
fn speculation_ends_with_what_events_say() {
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated; 2]);
    let blocks = chain(1, 20);
    let home = |bench: &mut Bench, id| bench.place(prompt(id, &blocks)).unwrap();
    let first = home(&mut bench, 1);
    let (worker, lease) = (first.winner.prefill, first.lease);
    assert_eq!(home(&mut bench, 2).winner.cached[0], 19 * common::BLOCK);
    // Given up before it was computed: nothing will be cached.
    let second = bench.placed[1].lease;
    assert!(bench.end(lease) && bench.end(second));
    assert_eq!(bench.selector.speculative(), 0);
    assert_eq!(home(&mut bench, 3).winner.cached[0], 0);
    // Confirmed: from here on the index answers.
    let third = &bench.placed[2];
    let (worker_3, lease_3) = (third.winner.prefill, third.lease);
    bench.progress(lease_3, true, 0);
    bench.selector.stored(worker_3, &blocks);
    assert_eq!(bench.selector.speculative(), 0);
    assert_eq!(
        home(&mut bench, 4).winner.cached[0],
        0,
        "the index holds nothing yet"
    );
    // Never confirmed: forgotten after a while.
    let fourth = bench.placed[3].lease;
    bench.progress(fourth, true, 0);
    bench.now += 5_000.0;
    bench.tick();
    assert_eq!(bench.selector.speculative(), 0);
    // Evicted while the lease lives.
    let fifth = home(&mut bench, 5);
    bench
        .selector
        .removed(bench.now, fifth.winner.prefill, &blocks);
    assert_eq!(home(&mut bench, 6).winner.cached[0], 0);
    assert!(ids.contains(&worker));
}

#[test]
fn reports_teach_the_rates() {
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated]);
    // In truth everything takes three times as long: with one worker in its class, class and worker learn it together.
    for id in 1..=200 {
        let placed = bench.place(prompt(id, &chain(id, 20))).unwrap();
        bench.now += 3.0 * (10.0 + 128.0);
        bench.progress(placed.lease, true, 0);
        bench.end(placed.lease);
    }
    let placed = bench.place(prompt(1000, &chain(1000, 20))).unwrap();
    let expected = 3.0 * 138.0;
    assert!(
        (placed.winner.terms.prefill / expected - 1.0).abs() < 0.25,
        "{:?}",
        placed.winner.terms
    );
    let errors = bench.selector.errors();
    assert_eq!(errors.count, 200);
    assert!(errors.absolute_ms < 0.5 * errors.actual_ms);
    let (_, pace) = bench.selector.pace(ids[0]).unwrap();
    // All but the last, which others of its pass may follow.
    assert_eq!(pace.count, 199);
    assert!(pace.error < 0.2, "{pace:?}");
}

#[test]
fn an_explained_placement_names_every_candidate() {
    let (mut bench, ids) = Bench::new(
        Config {
            explained: 16,
            ..planned()
        },
        &[Role::Aggregated; 3],
    );
    let placed = bench.place(prompt(1, &chain(1, 10))).unwrap();
    assert_eq!(placed.candidates.len(), ids.len());
    let lowest = placed
        .candidates
        .iter()
        .map(|c| c.terms.total())
        .fold(f64::INFINITY, f64::min);
    assert!(placed.winner.terms.total() <= lowest + 1.0);
}

/// Places what was submitted at once as the default does, each worker computing what it has in order, until all is done.
/// Returns when that is.
fn compute_all(bench: &mut Bench) -> f64 {
    // By worker, when each of its prompts is computed.
    let mut due: Vec<(f64, u64)> = Vec::new();
    let mut free: HashMap<WorkerId, f64> = HashMap::new();
    let mut seen = 0;
    loop {
        for placed in &bench.placed[seen..] {
            let end = free.entry(placed.winner.prefill).or_insert(0.0);
            *end = end.max(bench.now) + placed.winner.terms.prefill;
            due.push((*end, placed.lease));
        }
        seen = bench.placed.len();
        due.sort_by(|a, b| b.0.total_cmp(&a.0));
        let wakes = bench.selector.wakes_at(bench.now);
        match (due.last().copied(), wakes) {
            (Some((end, lease)), wakes) if wakes.is_none_or(|at| end <= at) => {
                due.pop();
                bench.now = bench.now.max(end);
                bench.progress(lease, true, 0);
            }
            (_, Some(at)) => {
                bench.now = bench.now.max(at);
                bench.tick();
            }
            (None, None) => return bench.now,
            (Some(_), None) => unreachable!("an end is due"),
        }
    }
}

#[test]
fn different_prompts_at_once_are_planned_to_spread() {
    let (mut bench, _) = Bench::new(Config::default(), &[Role::Aggregated; 8]);
    for id in 1..=64 {
        bench.submit(prompt(id, &chain(id, 20))).unwrap();
    }
    assert_eq!(bench.placed.len(), 16, "a plan holds 48");
    let end = compute_all(&mut bench);
    let shares = shares(&bench);
    assert!(
        shares.values().all(|count| (7..=9).contains(count)) && shares.len() == 8,
        "{shares:?}"
    );
    // Each takes 138 ms, and a little more beside streams.
    assert!(end < 9.0 * 138.0, "{end}");
}

#[test]
fn equal_prompts_at_once_are_planned_to_share_and_spread() {
    let (mut bench, _) = Bench::new(Config::default(), &[Role::Aggregated; 8]);
    for id in 1..=64 {
        bench.submit(prompt(id, &chain(1, 60))).unwrap();
    }
    let end = compute_all(&mut bench);
    let shares = shares(&bench);
    let all = bench.placed.iter();
    let fresh = all.filter(|placed| placed.winner.cached[0] == 0).count();
    // Nobody computes it twice; and of 394 ms and 16 more for each that shares, none waits for all 64 on one worker.
    assert_eq!(fresh, shares.len(), "{shares:?}");
    let most = shares.values().copied().max();
    assert!(shares.len() > 2 && most < Some(22), "{shares:?}");
    assert!(end < 394.0 + 22.0 * 16.4, "{end}");
}
