//! Urgent requests that plans hold are not passed over by those that waited longer; and those are not for ever.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, planned};
use kvmesh_select::{Config, Request, Role, WorkerId};
use smallvec::smallvec;

/// A prompt that fills a pass by itself: 4,000 tokens, 410 ms.
fn long(id: u64, priority: i32) -> Request {
    Request {
        id,
        prompt_tokens: 4_000,
        priority,
        ..Request::default()
    }
}

/// Plans hold, and nothing waits in line: workers have room for ever.
fn roomy() -> Config {
    let mut config = planned();
    config.admission.backlog_ms = f64::INFINITY;
    config
}

/// The worker of the last placement is done with it; what is placed then.
fn next(bench: &mut Bench) -> Vec<u64> {
    let last = bench.placed.last().unwrap();
    let (lease, ms, count) = (last.lease, last.winner.terms.prefill, bench.placed.len());
    bench.now += ms;
    bench.progress(lease, true, 1);
    bench.end(lease);
    bench.tick();
    bench.placed[count..]
        .iter()
        .map(|placed| placed.request)
        .collect()
}

#[test]
fn an_urgent_request_passes_those_that_waited_longer() {
    let (mut bench, _) = Bench::new(roomy(), &[Role::Aggregated]);
    for id in 0..5 {
        bench.submit(long(id, 0)).unwrap();
        bench.tick();
        bench.now += 40.0;
    }
    bench.submit(long(100, 3)).unwrap();
    bench.submit(long(101, 5)).unwrap();
    bench.submit(long(102, -1)).unwrap();
    assert_eq!(bench.selector.in_line(), 0, "plans hold them");
    let mut order = Vec::new();
    while bench.selector.held() > 0 {
        order.extend(next(&mut bench));
    }
    assert_eq!(order[..2], [101, 100]);
    assert_eq!(order.last(), Some(&102));
}

#[test]
fn of_too_many_the_most_urgent_is_placed_first() {
    let (mut bench, _) = Bench::new(roomy(), &[Role::Aggregated]);
    // One is placed at once, and 48 are held at most.
    for id in 0..49 {
        bench.submit(long(id, 0)).unwrap();
        bench.tick();
    }
    assert_eq!(bench.placed.len(), 1);
    bench.submit(long(100, 1)).unwrap();
    let placed: Vec<u64> = bench.placed.iter().map(|placed| placed.request).collect();
    assert_eq!(placed[1..], [100]);
}

#[test]
fn what_urgent_requests_leave_free_is_not_left_idle() {
    let (mut bench, ids) = Bench::new(roomy(), &[Role::Aggregated, Role::Aggregated]);
    let only = |id: u64, priority: i32, not: WorkerId| Request {
        exclude: smallvec![not],
        ..long(id, priority)
    };
    bench.submit(only(0, 0, ids[1])).unwrap();
    bench.tick();
    bench.submit(only(1, 9, ids[1])).unwrap();
    bench.submit(long(2, 0)).unwrap();
    bench.tick();
    let placed: Vec<_> = bench
        .placed
        .iter()
        .map(|placed| (placed.request, placed.winner.prefill))
        .collect();
    assert_eq!(placed, [(0, ids[0]), (2, ids[1])]);
}

/// The bound of `urgency`: who let `aging` pass is next, whatever else comes.
#[test]
fn a_flood_of_urgent_requests_starves_nobody() {
    for aging in [1, 8, 20] {
        let mut config = roomy();
        config.admission.aging = aging;
        let (mut bench, _) = Bench::new(config, &[Role::Aggregated]);
        bench.submit(long(0, 0)).unwrap();
        bench.tick();
        bench.submit(long(1, -10)).unwrap();
        let mut order = Vec::new();
        for id in 100..140 {
            bench.submit(long(id, 10)).unwrap();
            bench.submit(long(id + 100, 10)).unwrap();
            order.extend(next(&mut bench));
            if order.contains(&1) {
                break;
            }
        }
        assert_eq!(order.iter().position(|&id| id == 1), Some(aging as usize));
    }
}
