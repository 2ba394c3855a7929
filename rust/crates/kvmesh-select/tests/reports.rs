//! Reports that come in one message.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, planned, prompt};
use kvmesh_select::{Report, Role};

fn chain(owner: u64, count: u64) -> Vec<u64> {
    (0..count)
        .map(|block| (owner << 32) | (block + 1))
        .collect()
}

#[test]
fn what_reports_of_one_message_free_is_given_out_with_all_of_it_known() {
    let held = |at_once: bool| {
        let (mut bench, ids) = Bench::new(planned(), &[Role::Aggregated; 2]);
        let leases: Vec<u64> = [(1, 40), (2, 100)]
            .map(|(id, blocks)| bench.place(prompt(id, &chain(id, blocks))).unwrap())
            .iter()
            .map(|placed| placed.lease)
            .collect();
        let first = bench.placed[0].winner.prefill;
        let other = *ids.iter().find(|&&id| id != first).unwrap();
        // Its prompt is cached on the worker that is heard of last.
        bench.table.0.insert(other, chain(3, 40).to_vec());
        assert!(bench.place(prompt(3, &chain(3, 40))).is_none());
        bench.now += 60.0;
        let reports = [leases[0], leases[1]].map(|lease| Report {
            lease,
            prefilled: true,
            output_tokens: 1,
            ended: true,
            ..Report::default()
        });
        let unknown = bench.with(|selector, context| match at_once {
            true => selector.report(&reports, context),
            false => reports
                .iter()
                .flat_map(|report| selector.report(&[*report], context))
                .collect(),
        });
        assert!(unknown.is_empty());
        assert_eq!(bench.selector.leases().len(), 1);
        assert_eq!(
            bench.with(|selector, context| selector.report(&reports, context)),
            leases
        );
        let third = bench.placed.iter().find(|placed| placed.request == 3);
        (third.unwrap().winner.prefill, first, other)
    };
    let (chosen, _, other) = held(true);
    assert_eq!(chosen, other);
    // Told one by one, the worker that is free first has it.
    let (chosen, first, _) = held(false);
    assert_eq!(chosen, first);
}
