//! What generating on a worker costs, checked by hand.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, chain, immediate, prompt};
use kvmesh_select::{Prices, Role, WorkerSpec};

#[test]
fn a_request_pays_for_what_it_adds_to_the_streams_that_it_joins() {
    for roles in [&[Role::Aggregated][..], &[Role::Prefill, Role::Decode]] {
        joins(roles);
    }
}

fn joins(roles: &[Role]) {
    let (mut bench, ids) = Bench::new(immediate(), roles);
    let decode = ids[roles.len() - 1];
    for id in 1..=10 {
        let placed = bench.place(prompt(id, &chain(id, 100))).unwrap();
        bench.progress(placed.lease, true, 1);
    }
    let blocks = bench.selector.slots(decode).blocks as f64;
    let own = bench.step_ms(11.0, (blocks + 100.0) / 10_000.0);
    let each = own - bench.step_ms(10.0, blocks / 10_000.0);
    let placed = bench.place(prompt(11, &chain(11, 100))).unwrap();
    let prices = Prices::default();
    assert!(each > 0.1, "{each}");
    let expected = prices.token * (own + 10.0 * each);
    let paid = placed.winner.terms.decode;
    assert!((paid - expected).abs() < 1e-9, "{paid} {expected}");
}

#[test]
fn a_prefix_that_many_share_fills_the_pool_once() {
    let (mut bench, _) = Bench::new(immediate(), &[]);
    let pool = 100;
    let small = WorkerSpec {
        blocks: pool,
        ..common::spec(0, Role::Aggregated)
    };
    let id = bench.selector.add_worker(&small);
    let prefix = chain(1, 60);
    bench.table.0.insert(id, prefix.clone());
    // 60 blocks that they share and 10 of each one's own are in use; the last would fill the pool.
    let share = |own: f64| ((60.0 + own) / f64::from(pool)).min(1.0);
    let joined = |count: f64, with: f64, before: f64| {
        let step = bench.step_ms(count, share(with));
        let added = step - bench.step_ms(count - 1.0, share(before));
        Prices::default().token * (step + (count - 1.0) * added)
    };
    let (third, fourth) = (joined(3.0, 30.0, 20.0), joined(4.0, 110.0, 30.0));
    let again = 10.0 * f64::from(common::BLOCK) * bench.rate("prefill", 1);
    for own in 2..=4 {
        let blocks = [prefix.clone(), chain(own, 10)].concat();
        bench.place(prompt(own, &blocks)).unwrap();
    }
    let slots = bench.selector.slots(id);
    assert!(slots.blocks > u64::from(pool));
    assert_eq!(slots.distinct_blocks(), 90);
    let paid = bench.placed[2].winner.terms.decode;
    assert!((paid - third).abs() < 1e-9, "{paid} {third}");
    // 30 blocks are theirs alone; with 80 of another's, 10 too many.
    let cold = bench.place(prompt(5, &chain(5, 80))).unwrap();
    let (paid, expected) = (cold.winner.terms.decode, fourth + again);
    assert!((paid - expected).abs() < 1e-9, "{paid} {expected}");
}
