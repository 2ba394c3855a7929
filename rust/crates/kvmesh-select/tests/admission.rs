//! Who waits when no worker has room, in which order they leave, and who is refused.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::BTreeMap;

use common::{Bench, immediate, prompt, sized};
use kvmesh_select::{Admission, Config, NoWorker, PolicyName, Reason, Request, Role};
use proptest::prelude::*;

/// A worker takes one prompt at a time, so that placements follow each other as requests are released.
fn one_by_one(admission: Admission) -> Config {
    Config {
        admission: Admission {
            backlog_ms: 0.0,
            ..admission
        },
        ..immediate()
    }
}

fn of(tenant: u64, id: u64, tokens: u32) -> Request {
    Request {
        tenant,
        ..sized(id, tokens)
    }
}

fn urgent(priority: i32, id: u64) -> Request {
    Request {
        priority,
        ..sized(id, 100)
    }
}

fn due(deadline: f64, id: u64) -> Request {
    Request {
        deadline: Some(deadline),
        ..sized(id, 100)
    }
}

/// One worker, busy with request 0.
fn busy(admission: Admission) -> Bench {
    let (mut bench, _) = Bench::new(one_by_one(admission), &[Role::Aggregated]);
    bench.submit(sized(0, 100)).unwrap();
    assert_eq!(bench.placed.len(), 1);
    bench
}

/// The worker is done with what was placed last; the request that this releases.
fn next(bench: &mut Bench) -> Option<u64> {
    let last = bench.placed.last().unwrap();
    let (lease, ms, count) = (last.lease, last.winner.terms.prefill, bench.placed.len());
    bench.now += ms;
    bench.progress(lease, true, 1);
    bench.end(lease);
    assert!(bench.placed.len() <= count + 1, "one by one");
    bench.placed.get(count).map(|placed| placed.request)
}

fn drain(bench: &mut Bench) -> Vec<u64> {
    std::iter::from_fn(|| next(bench)).collect()
}

#[test]
fn the_most_urgent_leave_first() {
    let mut bench = busy(Admission::default());
    for (id, priority) in [(1, 0), (2, -3), (3, 7), (4, 0), (5, 99)] {
        bench.submit(urgent(priority, id)).unwrap();
    }
    assert_eq!(bench.selector.in_line(), 5);
    assert_eq!(drain(&mut bench), [5, 3, 1, 4, 2]);
}

/// The bound of `line`: a class that waits is served at least once in `aging` + 21 releases, whatever else comes.
#[test]
fn urgent_floods_starve_nobody() {
    for (aging, floods) in [(8, 1), (8, 20), (1, 20), (40, 3)] {
        let mut bench = busy(Admission {
            aging,
            ..Admission::default()
        });
        for id in 1..=5 {
            bench.submit(urgent(-10, id)).unwrap();
        }
        let (mut id, mut passed) = (100, 0);
        let mut patient = 1;
        while patient <= 5 {
            for flood in 0..floods {
                bench.submit(urgent(10 - flood, id)).unwrap();
                id += 1;
            }
            let released = next(&mut bench).unwrap();
            passed += 1;
            if released == patient {
                patient += 1;
                assert!(passed > aging as usize, "urgent ones keep most of it");
                passed = 0;
            }
            assert!(
                passed <= aging as usize + Admission::CLASSES,
                "{aging}, {floods}"
            );
        }
    }
}

#[test]
fn the_earliest_deadline_of_a_tenant_leaves_first() {
    let mut bench = busy(Admission::default());
    for (id, deadline) in [(1, 9e3), (2, 5e3), (3, 2e4), (4, 7e3)] {
        bench.submit(due(deadline, id)).unwrap();
    }
    bench.submit(sized(5, 100)).unwrap();
    bench.submit(due(1e3, 6)).unwrap();
    assert_eq!(
        drain(&mut bench),
        [6, 2, 4, 1, 3, 5],
        "no deadline is the latest"
    );
    assert!(bench.refused.is_empty());
}

#[test]
fn a_deadline_that_cannot_be_met_is_refused() {
    let mut bench = busy(Admission::default());
    // 4,000 tokens take 410 ms.
    let long = |deadline, id| Request {
        prompt_tokens: 4_000,
        ..due(deadline, id)
    };
    bench.submit(long(400.0, 1)).unwrap();
    bench.submit(long(500.0, 2)).unwrap();
    bench.submit(long(1_000.0, 3)).unwrap();
    let reasons = |bench: &Bench| -> Vec<(u64, Reason)> {
        bench
            .refused
            .iter()
            .map(|one| (one.request, one.reason))
            .collect()
    };
    assert_eq!(reasons(&bench), [(1, Reason::Deadline)]);
    // At 90 ms it could not be met by an idle worker either.
    let wake = bench.selector.wakes_at(bench.now).unwrap();
    assert!(wake <= 91.0, "{wake}");
    bench.now = 91.0;
    bench.tick();
    assert_eq!(reasons(&bench)[1..], [(2, Reason::Deadline)]);
    assert_eq!(bench.refused[1].held_ms, 91.0);
    assert_eq!(drain(&mut bench), [3]);
}

#[test]
fn nothing_waits_for_ever() {
    for policy in [PolicyName::RoundRobin, PolicyName::Kv] {
        for leaves in [false, true] {
            let config = Config {
                policy,
                joint: true,
                ..one_by_one(Admission {
                    max_wait_ms: 5_000.0,
                    ..Admission::default()
                })
            };
            let (mut bench, ids) = Bench::new(config, &[Role::Aggregated]);
            for id in 0..20 {
                bench.submit(sized(id, 4_000)).unwrap();
                bench.tick();
            }
            assert_eq!(bench.selector.held(), 20 - bench.placed.len());
            if leaves {
                bench.selector.remove_worker(ids[0]);
            }
            // The worker never reports anything.
            while let Some(at) = bench.selector.wakes_at(bench.now) {
                assert!(bench.now < 5_000.0 && at <= 5_000.0, "{policy}");
                bench.now = at.max(bench.now);
                bench.tick();
            }
            assert_eq!((bench.selector.held(), bench.now), (0, 5_000.0));
            assert_eq!(bench.refused.len() + bench.placed.len(), 20);
            assert!(bench.refused.iter().all(|one| one.reason == Reason::Waited));
            assert!(bench.placed.len() < 5);
            let answer = bench.submit(sized(99, 10));
            assert_eq!(answer, if leaves { Err(NoWorker) } else { Ok(()) });
        }
    }
}

#[test]
fn a_flood_drowns_nobody_else() {
    let mut bench = busy(Admission {
        max_held: 10,
        quantum_tokens: 100,
        ..Admission::default()
    });
    for id in 1..=100 {
        bench.submit(of(1, id, 100)).unwrap();
    }
    assert_eq!(bench.selector.in_line(), 10);
    assert_eq!(bench.refused.len(), 90);
    // Its first ten wait; those of others push its last ones out, until all have as many.
    for id in 101..=110 {
        bench.submit(of(2, id, 100)).unwrap();
    }
    let refused: Vec<u64> = bench.refused[90..].iter().map(|one| one.request).collect();
    assert_eq!(refused, [10, 9, 8, 7, 6, 106, 107, 108, 109, 110]);
    // An urgent one of the same tenant pushes out what is less urgent.
    bench
        .submit(Request {
            priority: 1,
            ..of(2, 200, 100)
        })
        .unwrap();
    assert_eq!(bench.refused.last().unwrap().request, 105);
    assert!(bench.refused.iter().all(|one| one.reason == Reason::Full));
    assert_eq!(
        drain(&mut bench),
        [200, 1, 101, 2, 102, 3, 103, 4, 104, 5][..]
    );
}

#[test]
fn retry_after_is_what_the_line_takes_to_leave() {
    let mut bench = busy(Admission {
        max_held: 20,
        ..Admission::default()
    });
    // 1,000 tokens take 110 ms; while 20 wait, that is 2.2 s.
    for id in 1..200 {
        bench.submit(sized(id, 1_000)).unwrap();
        if id > 20 {
            next(&mut bench);
        }
    }
    for id in 200..210 {
        bench.submit(sized(id, 1_000)).unwrap();
    }
    let told = bench.refused.last().unwrap().retry_after_ms;
    assert!((2_000.0..2_500.0).contains(&told), "{told}");
    // A worker that stands still makes it longer.
    bench.now += 5_000.0;
    bench.submit(sized(300, 1_000)).unwrap();
    let later = bench.refused.last().unwrap().retry_after_ms;
    assert!(later > 1.3 * told, "{told} {later}");
}

#[test]
fn a_cancelled_request_leaves_at_once() {
    let mut bench = busy(Admission {
        quantum_tokens: 100,
        ..Admission::default()
    });
    for id in 1..=4 {
        bench.submit(of(id % 2, id, 100)).unwrap();
    }
    assert!(bench.selector.withdraw(2) && !bench.selector.withdraw(2));
    assert_eq!(bench.selector.in_line(), 3);
    assert_eq!(drain(&mut bench), [1, 4, 3]);
    assert!(!bench.selector.withdraw(3), "it has been placed");
}

/// Plans weigh by waiting; who has waited longest in line is not therefore next.
#[test]
fn joint_plans_keep_the_lines_order() {
    let config = Config {
        joint: true,
        gather_ms: 0.0,
        admission: Admission {
            backlog_ms: 0.0,
            ..Admission::default()
        },
        ..Config::default()
    };
    let (mut bench, _) = Bench::new(config, &[Role::Aggregated]);
    for id in 0..24 {
        bench.submit(sized(id, 4_000)).unwrap();
        bench.now += 1.0;
        bench.tick();
    }
    let before = bench.placed.len();
    let urgent = Request {
        priority: 5,
        ..sized(100, 4_000)
    };
    bench.submit(urgent).unwrap();
    while bench.selector.held() > 0 {
        let last = bench.placed.last().unwrap();
        let (lease, ms) = (last.lease, last.winner.terms.prefill);
        bench.now += ms;
        bench.progress(lease, true, 1);
        bench.end(lease);
        bench.tick();
    }
    let place = bench.placed[before..]
        .iter()
        .position(|one| one.request == 100);
    // Behind those that a plan held already, which are few.
    assert!(
        place.unwrap() <= 5,
        "{place:?} of {}",
        bench.placed.len() - before
    );
}

/// A prefill worker with room and a decode worker with room make no pair when they are of two pools.
#[test]
fn room_is_that_of_a_pool() {
    let config = Config {
        policy: PolicyName::LeastLoaded,
        ..one_by_one(Admission::default())
    };
    let (mut bench, _) = Bench::new(config, &[Role::Prefill, Role::Decode]);
    let other = |key: u64, role: Role| kvmesh_select::WorkerSpec {
        pool: 1,
        ..common::spec(key, role)
    };
    // Of the other pool the decode worker alone: its room is nobody's.
    bench.selector.add_worker(&other(10, Role::Decode));
    bench.submit(sized(1, 100)).unwrap();
    bench.submit(sized(2, 100)).unwrap();
    assert_eq!((bench.placed.len(), bench.selector.in_line()), (1, 1));
    // Of a third one the prefill worker alone.
    let lonely = kvmesh_select::WorkerSpec {
        pool: 2,
        ..common::spec(11, Role::Prefill)
    };
    bench.selector.add_worker(&lonely);
    bench.tick();
    assert_eq!((bench.placed.len(), bench.selector.in_line()), (1, 1));
    bench.selector.add_worker(&other(12, Role::Prefill));
    bench.tick();
    assert_eq!((bench.placed.len(), bench.selector.in_line()), (2, 0));
}

#[test]
fn a_full_pool_holds_back_too() {
    let config = Config {
        policy: PolicyName::LeastLoaded,
        ..immediate()
    };
    for (roles, joint) in [
        (&[Role::Aggregated][..], false),
        (&[Role::Aggregated], true),
        (&[Role::Prefill, Role::Decode], false),
    ] {
        let policy = if joint { PolicyName::Kv } else { config.policy };
        let config = Config {
            joint,
            policy,
            gather_ms: 0.0,
            ..config.clone()
        };
        let (mut bench, _) = Bench::new(config, roles);
        // The pool has 10,000 blocks of 64 tokens; each takes 400 of its own.
        for id in 1..=30 {
            bench.submit(sized(id, 25_600)).unwrap();
            let leases: Vec<u64> = bench.placed.iter().map(|placed| placed.lease).collect();
            bench.now += 3_000.0;
            for lease in leases {
                bench.progress(lease, true, 1);
            }
        }
        assert_eq!(bench.placed.len(), 25, "{roles:?} {joint}");
        assert_eq!(bench.selector.in_line(), 30 - 25 - bench.refused.len());
        let first = bench.placed[0].lease;
        bench.end(first);
        bench.tick();
        assert_eq!(bench.placed.len(), 26);
    }
    // What is shared fills no pool twice.
    let (mut bench, ids) = Bench::new(config, &[Role::Aggregated]);
    let blocks: Vec<u64> = (1..=400).collect();
    bench.table.0.insert(ids[0], blocks.clone());
    for id in 1..=100 {
        assert!(bench.place(prompt(id, &blocks)).is_some());
        bench.now += 1_000.0;
        let lease = bench.placed.last().unwrap().lease;
        bench.progress(lease, true, 1);
    }
}

#[test]
fn with_room_nothing_changes() {
    for policy in PolicyName::ALL {
        let run = |admission: Admission, labels: bool| {
            let roles = [
                Role::Aggregated,
                Role::Aggregated,
                Role::Prefill,
                Role::Decode,
            ];
            let config = Config {
                policy,
                admission,
                ..Config::default()
            };
            let (mut bench, _) = Bench::new(config, &roles);
            for id in 1..=300 {
                let mut request = prompt(id, &[id % 5 + 1, id % 7 + 100]);
                request.session = id % 9;
                if labels {
                    request.tenant = id % 3;
                    request.priority = (id % 5) as i32 - 2;
                    request.deadline = Some(bench.now + 60_000.0);
                }
                bench.submit(request).unwrap();
                bench.now += 20.0;
                bench.tick();
                if let Some(placed) = bench.placed.iter().rev().nth(1) {
                    let lease = placed.lease;
                    bench.progress(lease, true, 20);
                    bench.end(lease);
                }
            }
            assert!(bench.refused.is_empty() && bench.selector.in_line() == 0);
            bench.placed
        };
        let plain = run(Admission::off(), false);
        assert!(plain.len() > 290);
        assert_eq!(run(Admission::default(), false), plain, "{policy}");
        assert_eq!(run(Admission::default(), true), plain, "{policy}");
    }
}

proptest! {
    /// The bound of `line`: over any time in which both wait.
    #[test]
    fn tenants_get_their_shares(
        few in prop::collection::vec(1u32..4_000, 30..60),
        many in prop::collection::vec(1u32..4_000, 200..250),
        weights in (0.1f64..4.0, 0.1f64..4.0),
        quantum_tokens in 100u32..20_000,
    ) {
        let mut bench = busy(Admission {
            quantum_tokens,
            max_wait_ms: 1e9,
            weights: BTreeMap::from([(1, weights.0), (2, weights.1)]),
            ..Admission::default()
        });
        let requests: Vec<(u64, u32)> = many.iter().map(|&tokens| (1, tokens))
            .chain(few.iter().map(|&tokens| (2, tokens))).collect();
        for (id, &(tenant, tokens)) in (1..).zip(&requests) {
            bench.submit(of(tenant, id, tokens)).unwrap();
        }
        let mut left = [many.len(), few.len()];
        let (mut lead, mut least, mut most) = (0.0, 0.0f64, 0.0f64);
        while left[0] > 0 && left[1] > 0 {
            let (tenant, tokens) = requests[next(&mut bench).unwrap() as usize - 1];
            left[tenant as usize - 1] -= 1;
            let tokens = f64::from(tokens);
            lead += if tenant == 1 { tokens / weights.0 } else { -tokens / weights.1 };
            (least, most) = (least.min(lead), most.max(lead));
        }
        let bound = f64::from(quantum_tokens) + 4_000.0 / weights.0 + 4_000.0 / weights.1;
        prop_assert!(most - least <= bound, "{} > {bound}", most - least);
    }
}
