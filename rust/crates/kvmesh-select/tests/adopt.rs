//! What one replica placed weighs in another as if it had been placed there.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, immediate, prompt};
use kvmesh_select::{Adopted, Placed, Role, WorkerId};
use proptest::prelude::*;

const ROLES: [Role; 4] = [Role::Aggregated, Role::Prefill, Role::Decode, Role::Decode];

/// A placement as it is told to others; `blocks` is the prompt.
fn told(placed: &Placed, prompt_tokens: u32, blocks: &[u64]) -> Adopted {
    Adopted {
        lease: placed.lease,
        prefill: placed.winner.prefill,
        decode: placed.winner.decode,
        prompt_tokens,
        cached: placed.winner.cached,
        blocks: blocks.into(),
        prefilled: false,
        output_tokens: 0,
    }
}

fn adopt(bench: &mut Bench, adopted: Adopted) -> bool {
    bench.with(|selector, context| selector.adopt(adopted, context))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn slots_of_replicas_agree(steps in prop::collection::vec((0u8..4, 0usize..32, 1u64..30), 1..120)) {
        let (mut here, ids) = Bench::new(immediate(), &ROLES);
        let (mut there, same) = Bench::new(immediate(), &ROLES);
        prop_assert_eq!(&ids, &same);
        let mut leases: Vec<u64> = Vec::new();
        for (number, (what, at, size)) in steps.into_iter().enumerate() {
            here.now += 5.0;
            there.now = here.now;
            let lease = leases.get(at % leases.len().max(1)).copied();
            match (what, lease) {
                (0 | 1, _) | (_, None) => {
                    let blocks: Vec<u64> = (0..size).map(|block| 1 + 100 * (at as u64 % 3) + block).collect();
                    let request = prompt(number as u64 + 1, &blocks);
                    let tokens = request.prompt_tokens;
                    let placed = here.place(request).unwrap();
                    let adopted = told(&placed, tokens, &blocks);
                    prop_assert!(adopt(&mut there, adopted.clone()));
                    prop_assert!(!adopt(&mut there, adopted), "once only");
                    leases.push(placed.lease);
                }
                (2, Some(lease)) => {
                    prop_assert!(here.progress(lease, true, size as u32));
                    prop_assert!(there.progress(lease, true, size as u32));
                }
                (_, Some(lease)) => {
                    leases.retain(|&other| other != lease);
                    prop_assert!(here.end(lease) && there.end(lease));
                }
            }
            for &id in &ids {
                prop_assert_eq!(here.selector.slots(id), there.selector.slots(id));
            }
            prop_assert_eq!(here.selector.speculative(), there.selector.speculative());
            prop_assert_eq!(here.selector.speculated(), there.selector.speculated());
        }
        for lease in leases {
            there.end(lease);
        }
        for &id in &ids {
            prop_assert_eq!(there.selector.slots(id), kvmesh_select::Slots::default());
        }
    }
}

#[test]
fn the_next_request_goes_where_the_other_replica_put_nothing() {
    let (mut here, ids) = Bench::new(immediate(), &[Role::Aggregated; 2]);
    let (mut there, _) = Bench::new(immediate(), &[Role::Aggregated; 2]);
    let blocks: Vec<u64> = (1..60).collect();
    let first = here.place(prompt(1, &blocks)).unwrap();
    assert!(adopt(&mut there, told(&first, 59 * 64, &blocks)));
    let other: Vec<u64> = (1_000..1_060).collect();
    let next = there.place(prompt(2, &other)).unwrap();
    assert_ne!(next.winner.prefill, first.winner.prefill);
    // Its prefix is being computed where the other replica sent it.
    let again: Vec<u64> = (1..60).chain([77]).collect();
    let follows = there.place(prompt(3, &again)).unwrap();
    assert_eq!(follows.winner.prefill, first.winner.prefill);
    assert_eq!(follows.winner.cached.iter().sum::<u32>(), 59 * 64);
    // What was predicted there is not this one's error.
    assert!(there.progress(first.lease, true, 1));
    assert_eq!(there.selector.errors().count, 0);
    assert!(ids.contains(&first.winner.prefill));
}

#[test]
fn a_lease_that_is_not_heard_of_ends_by_its_time() {
    let (mut there, ids) = Bench::new(immediate(), &[Role::Aggregated]);
    let adopted = |lease, worker, prefilled| Adopted {
        lease,
        prefill: worker,
        decode: worker,
        prompt_tokens: 640,
        cached: [u32::MAX; 4],
        blocks: [1, 2, 3].into(),
        prefilled,
        output_tokens: 10,
    };
    assert!(adopt(&mut there, adopted(5, ids[0], false)));
    assert!(adopt(&mut there, adopted(6, ids[0], true)));
    // Its worker has left meanwhile.
    assert!(adopt(
        &mut there,
        adopted(7, WorkerId::from_raw(u64::MAX), false)
    ));
    assert!(!adopt(&mut there, adopted(0, ids[0], false)));
    assert_eq!(there.selector.slots(ids[0]).requests, 2);
    there.now += 30_001.0;
    let mut expired = there.tick();
    expired.sort_unstable();
    assert_eq!(expired, [5, 6, 7]);
    assert_eq!(
        there.selector.slots(ids[0]),
        kvmesh_select::Slots::default()
    );
    assert_eq!(there.selector.speculative(), 0);
}

#[test]
fn a_lease_that_comes_again_is_speculated_on_once() {
    let (mut there, ids) = Bench::new(immediate(), &[Role::Aggregated]);
    let adopted = Adopted {
        lease: 5,
        prefill: ids[0],
        decode: ids[0],
        prompt_tokens: 640,
        cached: [0; 4],
        blocks: [1, 2, 3].into(),
        prefilled: false,
        output_tokens: 0,
    };
    assert!(adopt(&mut there, adopted.clone()));
    // Its blocks are still waited for when it ends.
    assert!(there.progress(5, true, 1) && there.end(5));
    assert!(adopt(&mut there, adopted));
    assert_eq!(there.selector.speculated(), (3, 6));
    assert!(there.end(5));
    assert_eq!(there.selector.speculated(), (0, 0));
}
