//! Random programs of requests, workers and time: every request ends once, in time, and twice alike.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::HashSet;

use common::Bench;
use kvmesh_select::{Admission, Config, PolicyName, Request, Role};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Submit(Request),
    Finish(usize),
    Withdraw(u64),
    Wait(f64),
    Leave(usize),
    Join(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let request = (
        (0u64..4, -12i32..12, prop::option::of(0.0f64..4_000.0)),
        (1u32..6_000, prop::option::of(0usize..6), 0u64..3),
    );
    prop_oneof![
        8 => request.prop_map(|((tenant, priority, deadline), (tokens, policy, owner))| {
            Step::Submit(Request {
                tenant,
                priority,
                deadline,
                prompt_tokens: tokens,
                blocks: (0..u64::from(tokens / common::BLOCK)).map(|at| 1 + owner * 1_000 + at).collect(),
                policy: policy.map(|at| PolicyName::ALL[at]),
                ..Request::default()
            })
        }),
        5 => (0usize..64).prop_map(Step::Finish),
        2 => (0u64..80).prop_map(Step::Withdraw),
        2 => (1.0f64..600.0).prop_map(Step::Wait),
        1 => (0usize..4).prop_map(Step::Leave),
        1 => (0usize..4).prop_map(Step::Join),
    ]
}

/// Time goes on; the selector is woken when it asks to be.
fn until(bench: &mut Bench, end: f64) {
    let mut wakes = 0;
    while let Some(at) = bench.selector.wakes_at(bench.now) {
        if at > end {
            break;
        }
        bench.now = at.max(bench.now);
        bench.tick();
        wakes += 1;
        assert!(wakes < 10_000, "it asks to be woken without end");
    }
    bench.now = end;
}

/// Every request is placed, refused, withdrawn or turned away, exactly once, whatever happens; and twice alike.
fn program(steps: &[Step]) -> (Vec<kvmesh_select::Placed>, Vec<kvmesh_select::Refused>) {
    const ROLES: [Role; 4] = [
        Role::Aggregated,
        Role::Aggregated,
        Role::Prefill,
        Role::Decode,
    ];
    let bounds = Admission {
        backlog_ms: 300.0,
        max_held: 6,
        max_wait_ms: 2_000.0,
        ..Admission::default()
    };
    let config = Config {
        admission: bounds.clone(),
        ..Config::default()
    };
    let (mut bench, mut ids) = Bench::new(config, &ROLES);
    let (mut submitted, mut gone, mut keys) = (0, HashSet::new(), 10);
    for step in steps.iter().cloned() {
        match step {
            Step::Submit(mut request) => {
                submitted += 1;
                request.id = submitted;
                request.deadline = request.deadline.map(|after| bench.now + after);
                if bench.submit(request).is_err() {
                    assert!(gone.insert(submitted));
                }
            }
            Step::Finish(at) => {
                let count = bench.placed.len().max(1);
                if let Some(lease) = bench.placed.get(at % count).map(|placed| placed.lease) {
                    bench.progress(lease, true, 1);
                    bench.end(lease);
                }
            }
            Step::Withdraw(id) => {
                if bench.selector.withdraw(id) {
                    assert!(gone.insert(id));
                }
            }
            Step::Wait(ms) => {
                let end = bench.now + ms;
                until(&mut bench, end);
            }
            Step::Leave(at) => bench.selector.remove_worker(ids[at]),
            Step::Join(at) => {
                keys += 1;
                bench.selector.remove_worker(ids[at]);
                ids[at] = bench.selector.add_worker(&common::spec(keys, ROLES[at]));
            }
        }
        let selector = &bench.selector;
        assert!(selector.in_line() <= bounds.max_held);
        let ended = bench.placed.len() + bench.refused.len() + gone.len();
        assert_eq!(ended + selector.held(), submitted as usize);
    }
    // Nobody reports anything more: all that is held ends in time, woken as the selector asks.
    let end = bench.now + bounds.max_wait_ms;
    until(&mut bench, end);
    assert_eq!(bench.selector.held(), 0);
    let ends = bench.placed.iter().map(|placed| placed.request);
    for id in ends.chain(bench.refused.iter().map(|refused| refused.request)) {
        assert!(gone.insert(id), "{id} ended twice");
    }
    assert_eq!(gone.len(), submitted as usize);
    let waits = bench.placed.iter().map(|placed| placed.held_ms);
    assert!(waits.fold(0.0, f64::max) <= bounds.max_wait_ms + 1e-6);
    for refused in &bench.refused {
        assert!(refused.retry_after_ms >= 100.0 && refused.held_ms <= bounds.max_wait_ms + 1e-6);
    }
    (bench.placed, bench.refused)
}

proptest! {
    #[test]
    fn every_request_ends_once(steps in prop::collection::vec(step(), 1..160)) {
        prop_assert_eq!(program(&steps), program(&steps));
    }
}
