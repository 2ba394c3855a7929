//! What would be chosen, without a trace.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, planned, prompt};
use kvmesh_select::{Config, NoWorker, PolicyName, Role};

#[test]
fn a_selection_says_what_would_be_placed_and_leaves_no_trace() {
    for policy in PolicyName::ALL {
        let run = |selects: bool| {
            let config = Config {
                policy,
                ..planned()
            };
            let roles = [
                Role::Aggregated,
                Role::Aggregated,
                Role::Prefill,
                Role::Decode,
                Role::Decode,
            ];
            let (mut bench, _) = Bench::new(config, &roles);
            for id in 1..60 {
                let request = prompt(id, &[id % 5 + 1, id % 7 + 100]);
                if selects {
                    let chance = bench.chance.clone();
                    let again = bench.with(|one, context| one.select(&request, context));
                    let selected = again.unwrap();
                    assert_eq!((selected.lease, selected.policy), (0, policy));
                    assert!(
                        selected
                            .candidates
                            .iter()
                            .any(|one| one == &selected.winner)
                    );
                    bench.chance = chance;
                    let alone = bench.selector.held() == 0;
                    let leases = bench.selector.leases().len();
                    bench.submit(request).unwrap();
                    bench.tick();
                    if alone && bench.placed.last().is_some_and(|last| last.request == id) {
                        assert_eq!(bench.placed.last().unwrap().winner, selected.winner);
                        assert_eq!(bench.selector.leases().len(), leases + 1);
                    }
                } else {
                    bench.submit(request).unwrap();
                    bench.tick();
                }
                bench.now += 7.0;
                bench.tick();
                if let Some(placed) = bench.placed.iter().rev().nth(2) {
                    let lease = placed.lease;
                    bench.progress(lease, true, 1);
                    bench.end(lease);
                }
            }
            bench.placed
        };
        assert_eq!(run(true), run(false), "{policy}");
    }
}

#[test]
fn a_selection_without_workers_is_none() {
    let (mut bench, ids) = Bench::new(planned(), &[Role::Aggregated]);
    bench.selector.remove_worker(ids[0]);
    let none = bench.with(|one, context| one.select(&prompt(1, &[1]), context));
    assert_eq!(none, Err(NoWorker));
}
