//! When the line is looked at again, where room comes up that no report tells of.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, immediate, sized};
use kvmesh_select::{Admission, Config, Request, Role};

/// A queue is full that takes longer than this.
fn narrow(backlog_ms: f64) -> Config {
    Config {
        admission: Admission {
            backlog_ms,
            ..Admission::default()
        },
        ..immediate()
    }
}

#[test]
fn whoever_joins_is_given_what_waits() {
    let (mut bench, _) = Bench::new(narrow(0.0), &[Role::Aggregated]);
    bench.submit(sized(0, 100)).unwrap();
    bench.submit(sized(1, 100)).unwrap();
    assert!(bench.selector.wakes_at(bench.now) > Some(bench.now));
    bench
        .selector
        .add_worker(&common::spec(7, Role::Aggregated));
    assert_eq!(bench.selector.wakes_at(bench.now), Some(bench.now));
    bench.tick();
    assert_eq!(bench.placed[1].request, 1);
}

/// One that has time and no blocks left hides nobody whose time comes.
#[test]
fn a_queue_that_gets_shorter_is_looked_at_beside_a_full_pool() {
    let (mut bench, ids) = Bench::new(narrow(50.0), &[Role::Aggregated; 2]);
    // 10,000 blocks of 64 tokens.
    let filling = Request {
        exclude: [ids[1]].into_iter().collect(),
        ..sized(0, 640_000)
    };
    bench.submit(filling).unwrap();
    let lease = bench.placed[0].lease;
    bench.progress(lease, true, 1);
    bench.submit(sized(1, 1_000)).unwrap();
    assert_eq!(bench.placed[1].winner.prefill, ids[1]);
    bench.submit(sized(2, 100)).unwrap();
    assert_eq!(bench.selector.in_line(), 1);
    bench.now = bench.selector.wakes_at(bench.now).unwrap();
    bench.tick();
    assert_eq!(bench.placed[2].winner.prefill, ids[1]);
    assert!(bench.now < 1_000.0, "{}", bench.now);
}
