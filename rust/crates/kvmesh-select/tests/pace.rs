//! Decode workers that are slow, and how that is learned and forgotten.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{Bench, immediate, prompt};
use kvmesh_select::{Role, WorkerId};

/// Streams that have not ended, with the milliseconds that each of their tokens takes.
struct Live {
    lease: u64,
    worker: WorkerId,
    begun: f64,
    token_ms: f64,
}

/// One prefill and three decode workers whose streams are reported on once a second.
struct Split {
    bench: Bench,
    decode: Vec<WorkerId>,
    live: Vec<Live>,
    requests: u64,
}

impl Split {
    fn new() -> Self {
        let roles = [Role::Prefill, Role::Decode, Role::Decode, Role::Decode];
        let (bench, ids) = Bench::new(immediate(), &roles);
        Self {
            bench,
            decode: ids[1..].to_vec(),
            live: Vec::new(),
            requests: 0,
        }
    }

    /// Begins a stream; returns where.
    fn stream(&mut self, token_ms: impl Fn(WorkerId) -> f64) -> WorkerId {
        self.requests += 1;
        let placed = self.bench.place(prompt(self.requests, &[])).unwrap();
        self.bench.progress(placed.lease, true, 1);
        let worker = placed.winner.decode;
        self.live.push(Live {
            lease: placed.lease,
            worker,
            begun: self.bench.now,
            token_ms: token_ms(worker),
        });
        worker
    }

    fn seconds(&mut self, count: usize) {
        for _ in 0..count {
            self.bench.now += 1_000.0;
            for one in &self.live {
                let tokens = 1.0 + (self.bench.now - one.begun) / one.token_ms;
                self.bench.progress(one.lease, true, tokens as u32);
            }
            self.bench.tick();
        }
    }

    fn end_all(&mut self) {
        for one in self.live.drain(..) {
            self.bench.end(one.lease);
        }
    }

    fn slower(&self) -> Vec<f64> {
        let pace = |&id: &WorkerId| self.bench.selector.pace(id).unwrap().0;
        self.decode.iter().map(pace).collect()
    }
}

#[test]
fn a_slow_decode_worker_is_known_before_its_streams_end() {
    let mut split = Split::new();
    let slow = split.decode[0];
    let token_ms = |worker| if worker == slow { 25.0 } else { 5.0 };
    for _ in 0..9 {
        split.stream(token_ms);
    }
    assert!(split.live.iter().any(|one| one.worker == slow));
    split.seconds(5);
    let slower = split.slower();
    assert!(slower[0] > 2.5 && slower[1..] == [1.0, 1.0], "{slower:?}");
    let (_, pace) = split.bench.selector.pace(slow).unwrap();
    assert_eq!(
        pace.count, 5,
        "a second is one observation, however many streams"
    );
    for _ in 0..20 {
        assert_ne!(split.stream(token_ms), slow);
    }
}

#[test]
fn a_worker_that_was_slow_is_tried_again() {
    let mut split = Split::new();
    let slow = split.decode[0];
    for _ in 0..3 {
        split.stream(|worker| if worker == slow { 25.0 } else { 5.0 });
    }
    split.seconds(10);
    split.end_all();
    assert!(split.slower()[0] > 3.0);
    split.seconds(30);
    assert!(split.slower()[0] > 1.5, "not at once");
    split.seconds(120);
    assert_eq!(split.slower()[0], 1.0);
    let again: Vec<_> = (0..9).map(|_| split.stream(|_| 5.0)).collect();
    assert!(again.contains(&slow));
    split.seconds(10);
    assert_eq!(split.slower(), [1.0; 3]);
}

#[test]
fn one_slow_reader_makes_no_slow_worker() {
    let mut split = Split::new();
    for at in 0..30 {
        split.stream(|_| if at % 10 == 0 { 50.0 } else { 5.5 });
    }
    split.seconds(20);
    assert_eq!(split.slower(), [1.0; 3]);
}
