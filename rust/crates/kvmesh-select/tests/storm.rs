//! Ten times the requests that the workers can serve: most are refused at once, the others keep their bound.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use std::collections::HashMap;

use common::Bench;
use kvmesh_select::{Admission, Config, PolicyName, Reason, Request, Role, WorkerId};

const WORKERS: usize = 4;
/// 1,000 tokens take 110 ms.
const TOKENS: u32 = 1_000;
const OWN_MS: f64 = 110.0;

/// Workers that compute prompts one after the other and generate nothing; time goes on from event to event.
struct Workers {
    bench: Bench,
    /// When each is done with all it has.
    free: HashMap<WorkerId, f64>,
    /// (when, lease), the next first.
    ends: Vec<(f64, u64)>,
    seen: usize,
    most: (usize, usize, usize),
}

impl Workers {
    fn new(policy: PolicyName, admission: Admission) -> Self {
        let config = Config {
            policy,
            admission,
            ..Config::default()
        };
        let (bench, _) = Bench::new(config, &[Role::Aggregated; WORKERS]);
        Self {
            bench,
            free: HashMap::new(),
            ends: Vec::new(),
            seen: 0,
            most: (0, 0, 0),
        }
    }

    /// Lets the workers go on until `now`.
    fn until(&mut self, now: f64) {
        loop {
            self.note();
            let wake = self.bench.selector.wakes_at(self.bench.now);
            let end = self.ends.first().map(|&(at, _)| at);
            let next = [wake, end]
                .into_iter()
                .flatten()
                .fold(f64::INFINITY, f64::min);
            if next > now {
                break;
            }
            self.bench.now = next.max(self.bench.now);
            if end == Some(next) {
                let (_, lease) = self.ends.remove(0);
                self.bench.progress(lease, true, 1);
                self.bench.end(lease);
            } else {
                self.bench.tick();
            }
        }
        self.bench.now = now;
    }

    /// Gives the workers what was placed on them.
    fn note(&mut self) {
        for placed in &self.bench.placed[self.seen..] {
            let free = self.free.entry(placed.winner.prefill).or_default();
            *free = free.max(self.bench.now) + OWN_MS;
            let at = self.ends.partition_point(|&(end, _)| end <= *free);
            self.ends.insert(at, (*free, placed.lease));
        }
        self.seen = self.bench.placed.len();
        let selector = &self.bench.selector;
        let (line, held, leases) = self.most;
        self.most = (
            line.max(selector.in_line()),
            held.max(selector.held()),
            leases.max(selector.leases().len()),
        );
    }
}

#[test]
fn a_storm_is_refused_and_the_rest_keep_their_bound() {
    for policy in PolicyName::ALL {
        let bounds = Admission {
            backlog_ms: 500.0,
            max_held: 100,
            max_wait_ms: 2_000.0,
            ..Admission::default()
        };
        let mut workers = Workers::new(policy, bounds.clone());
        let capacity = WORKERS as f64 / OWN_MS;
        let (storm_ms, mut id) = (30_000.0, 0);
        while workers.bench.now < storm_ms {
            let now = workers.bench.now + 0.1 / capacity;
            workers.until(now);
            id += 1;
            // Three in four are one tenant's.
            let request = Request {
                id,
                prompt_tokens: TOKENS,
                tenant: 1 + u64::from(id % 4 == 0),
                session: id,
                ..Request::default()
            };
            workers.bench.submit(request).unwrap();
        }
        workers.until(f64::MAX);
        let (line, held, leases) = workers.most;
        assert!(
            line <= bounds.max_held && held <= bounds.max_held + 48,
            "{policy}: {held}"
        );
        // Blind policies give out more while some worker has room.
        let blind = matches!(policy, PolicyName::Random | PolicyName::Session);
        // What a worker has takes it little longer than the bound.
        let most = if blind { 1_000 } else { WORKERS * 7 + 48 };
        assert!(leases <= most, "{policy}: {leases} leases");
        let Bench {
            selector,
            placed,
            refused,
            ..
        } = &workers.bench;
        assert_eq!((selector.held(), selector.leases().len()), (0, 0));
        assert_eq!(placed.len() + refused.len(), id as usize);
        // The workers were busy all the time, and after it with what had been admitted.
        let served = placed.len() as f64;
        let could = capacity * storm_ms;
        assert!(
            (0.95 * could..1.2 * could).contains(&served),
            "{policy}: {served} of {could}"
        );
        let longest = placed.iter().map(|one| one.held_ms).fold(0.0, f64::max);
        assert!(longest <= bounds.max_wait_ms, "{policy}: {longest}");
        // Once the rate is known nearly all learn at once that there is no room.
        let late = refused
            .iter()
            .filter(|one| one.reason != Reason::Full)
            .count();
        assert!(
            late < refused.len() / 20,
            "{policy}: {late} of {}",
            refused.len()
        );
        // Both tenants always had some waiting: each got half.
        let second = placed.iter().filter(|one| one.request % 4 == 0).count() as f64;
        assert!(
            (0.45..0.55).contains(&(second / served)),
            "{policy}: {second} of {served}"
        );
    }
}
