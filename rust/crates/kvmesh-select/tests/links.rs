//! Links between prefill and decode workers that differ.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, immediate, prompt};
use kvmesh_select::{Config, Placed, Progress, Request, Role, WorkerId};

const ROLES: [Role; 4] = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
/// Of 40 blocks of 64 tokens at 0.01 ms, and 1 ms.
const TRANSFER_MS: f64 = 26.6;

struct Pairs {
    bench: Bench,
    ids: Vec<WorkerId>,
    requests: u64,
}

impl Pairs {
    fn new() -> Self {
        let config = Config {
            explained: 8,
            ..immediate()
        };
        let (bench, ids) = Bench::new(config, &ROLES);
        Self {
            bench,
            ids,
            requests: 0,
        }
    }

    fn place(&mut self, exclude: &[WorkerId]) -> Placed {
        self.requests += 1;
        let id = self.requests;
        let blocks: Vec<u64> = (0..40).map(|block| id << 32 | block).collect();
        let request = Request {
            exclude: exclude.iter().copied().collect(),
            ..prompt(id, &blocks)
        };
        self.bench.place(request).unwrap()
    }

    /// A request of each pair, whose engines measure what its transfer takes.
    fn round(&mut self, transfer_ms: impl Fn(WorkerId, WorkerId) -> f64) {
        for (prefill, decode) in [(0, 2), (0, 3), (1, 2), (1, 3)] {
            let others = [self.ids[1 - prefill], self.ids[5 - decode]];
            let placed = self.place(&others);
            let winner = placed.winner;
            let moved = transfer_ms(winner.prefill, winner.decode);
            self.bench.now += winner.terms.prefill + moved;
            let progress = Progress {
                prefilled: true,
                output_tokens: 1,
            };
            self.bench.with(|selector, context| {
                selector.progress_moved(placed.lease, progress, moved, context)
            });
            self.bench.end(placed.lease);
        }
    }

    fn factors(&self) -> Vec<f64> {
        let of = |&id: &WorkerId| self.bench.selector.links(id);
        self.ids[2..]
            .iter()
            .flat_map(of)
            .map(|(_, factor, _)| factor)
            .collect()
    }
}

fn about(actual: f64, expected: f64) -> bool {
    (actual / expected - 1.0).abs() < 0.2
}

#[test]
fn a_slow_link_is_learned_and_avoided_and_is_no_other_links_fault() {
    let mut pairs = Pairs::new();
    let slow = (pairs.ids[0], pairs.ids[2]);
    for _ in 0..20 {
        pairs.round(|prefill, decode| match (prefill, decode) == slow {
            true => 8.0 * TRANSFER_MS,
            false => TRANSFER_MS,
        });
    }
    let factors = pairs.factors();
    assert!(factors[0] > 3.0, "{factors:?}");
    assert_eq!(factors[1..], [1.0; 3]);
    for _ in 0..20 {
        let placed = pairs.place(&[pairs.ids[1]]);
        assert_eq!(placed.winner.decode, pairs.ids[3], "over the fast link");
        pairs.bench.end(placed.lease);
        let placed = pairs.place(&[pairs.ids[3]]);
        assert_eq!(placed.winner.prefill, pairs.ids[1], "over the fast link");
        let transfer = placed.winner.terms.transfer;
        assert!(about(transfer, TRANSFER_MS), "{transfer}");
        pairs.bench.end(placed.lease);
    }
    // What was not chosen is shown with its own links.
    let placed = pairs.place(&[]);
    assert_eq!(placed.candidates.len(), 4);
    for (candidate, cost) in placed.candidates.iter().zip(&placed.costs) {
        let pair = (candidate.prefill, candidate.decode);
        let link = if pair == slow { factors[0] } else { 1.0 };
        assert!(about(candidate.terms.transfer, link * TRANSFER_MS));
        assert!((candidate.terms.total() - cost).abs() < 1e-9);
    }
    assert!(placed.costs.is_sorted());
    pairs.bench.selector.remove_worker(slow.0);
    assert_eq!(pairs.factors(), [1.0; 2]);
}

/// All of them take ten times as long as was probed: so does the class, and none of them stands out.
#[test]
fn what_all_links_take_is_their_class_and_not_theirs() {
    let mut pairs = Pairs::new();
    for _ in 0..300 {
        pairs.round(|_, _| 10.0 * TRANSFER_MS);
    }
    assert_eq!(pairs.factors(), [1.0; 4]);
    let placed = pairs.place(&[]);
    assert!(about(placed.winner.terms.transfer, 10.0 * TRANSFER_MS));
}

#[test]
fn equal_links_and_single_outliers_change_nothing() {
    let (mut measured, mut outlier) = (Pairs::new(), Pairs::new());
    for turn in 0..30 {
        measured.round(|_, _| TRANSFER_MS);
        let slow = if turn % 10 == 9 { 100.0 } else { 1.0 };
        outlier.round(|_, _| slow * TRANSFER_MS);
    }
    assert_eq!(measured.factors(), [1.0; 4]);
    assert_eq!(outlier.factors(), [1.0; 4]);
}
