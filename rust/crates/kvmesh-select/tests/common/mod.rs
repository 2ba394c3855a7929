//! A selector with workers whose rates are round numbers, and an index that is a table.
#![allow(dead_code)]

use std::collections::HashMap;

use kvmesh_select::{
    Config, Context, Found, Lookup, NoWorker, Placed, Probe, Progress, Refused, Request, Role,
    Selector, WorkerId, WorkerSpec,
};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

pub const BLOCK: u32 = 64;

/// Blocks by worker, device tier only.
#[derive(Default)]
pub struct Table(pub HashMap<WorkerId, Vec<u64>>);

impl Lookup for Table {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        for (&worker, held) in &self.0 {
            let depth = blocks.iter().take_while(|hash| held.contains(hash)).count() as u32;
            if depth > 0 {
                found.push(Found {
                    worker,
                    depths: [depth; 4],
                });
            }
        }
    }
}

pub struct Bench {
    pub selector: Selector,
    pub table: Table,
    pub chance: ChaCha8Rng,
    pub placed: Vec<Placed>,
    pub refused: Vec<Refused>,
    pub now: f64,
}

/// Every pass takes 10 ms and every prompt token 0.1 ms; between tokens are 5 ms and 0.1 ms a stream.
pub fn probe() -> Probe {
    Probe {
        prefill: [100, 500, 1000, 4000]
            .map(|n| (n, 0, 10.0 + 0.1 * f64::from(n)))
            .to_vec(),
        decode: [1, 10, 40]
            .map(|n| (n, 0.0, 5.0 + 0.1 * f64::from(n)))
            .to_vec(),
        transfer: [100, 1000, 4000]
            .map(|n| (n, 1.0 + 0.01 * f64::from(n)))
            .to_vec(),
    }
}

pub fn spec(key: u64, role: Role) -> WorkerSpec {
    WorkerSpec {
        key,
        role,
        class: "test".into(),
        pool: 0,
        blocks: 10_000,
        pass_tokens: 4096,
        probe: probe(),
        offers: Vec::new(),
    }
}

/// Hashes of a prompt's blocks, of which no other owner has any.
pub fn chain(owner: u64, count: u64) -> Vec<u64> {
    (0..count)
        .map(|block| (owner << 32) | (block + 1))
        .collect()
}

/// A prompt of whole blocks with these hashes.
pub fn prompt(id: u64, blocks: &[u64]) -> Request {
    Request {
        id,
        prompt_tokens: (blocks.len() as u32 * BLOCK).max(1),
        blocks: blocks.into(),
        ..Request::default()
    }
}

/// A prompt of which nothing is known but its length.
pub fn sized(id: u64, tokens: u32) -> Request {
    Request {
        id,
        prompt_tokens: tokens,
        ..Request::default()
    }
}

impl Bench {
    pub fn new(config: Config, roles: &[Role]) -> (Self, Vec<WorkerId>) {
        let mut selector = Selector::new(Config {
            block_tokens: BLOCK,
            ..config
        });
        let ids = roles
            .iter()
            .zip(0..)
            .map(|(&role, key)| selector.add_worker(&spec(key, role)))
            .collect();
        let bench = Self {
            selector,
            table: Table::default(),
            chance: ChaCha8Rng::seed_from_u64(7),
            placed: Vec::new(),
            refused: Vec::new(),
            now: 0.0,
        };
        (bench, ids)
    }

    pub fn with<R>(&mut self, what: impl FnOnce(&mut Selector, &mut Context<'_>) -> R) -> R {
        let Self {
            selector,
            table,
            chance,
            placed,
            refused,
            now,
        } = self;
        what(
            selector,
            &mut Context {
                now: *now,
                lookup: table,
                chance,
                placed,
                refused,
            },
        )
    }

    pub fn submit(&mut self, request: Request) -> Result<(), NoWorker> {
        self.with(|selector, context| selector.submit(request, context))
    }

    /// Submits, and lets a plan that gathers be made.
    pub fn place(&mut self, request: Request) -> Option<Placed> {
        let id = request.id;
        self.submit(request).expect("a worker");
        self.tick();
        self.placed
            .iter()
            .find(|placed| placed.request == id)
            .cloned()
    }

    /// A coefficient of what the first class of workers is known to take.
    pub fn rate(&self, law: &str, at: usize) -> f64 {
        let (_, _, laws) = &self.selector.rates()[0];
        let law = laws.iter().find(|one| one.name == law).expect("a law");
        law.coefficients[at].1
    }

    /// Milliseconds between tokens of so many streams, with this share of the pool in use.
    pub fn step_ms(&self, streams: f64, share: f64) -> f64 {
        let [one, stream, full] = [0, 1, 2].map(|at| self.rate("decode", at));
        one + stream * streams + full * share
    }

    pub fn tick(&mut self) -> Vec<u64> {
        self.with(|selector, context| selector.tick(context))
    }

    pub fn progress(&mut self, lease: u64, prefilled: bool, output_tokens: u32) -> bool {
        self.with(|selector, context| {
            selector.progress(
                lease,
                Progress {
                    prefilled,
                    output_tokens,
                },
                context,
            )
        })
    }

    pub fn end(&mut self, lease: u64) -> bool {
        self.with(|selector, context| selector.end(lease, context))
    }
}

pub fn immediate() -> Config {
    Config {
        joint: false,
        ..Config::default()
    }
}

pub fn planned() -> Config {
    Config {
        gather_ms: 0.0,
        ..Config::default()
    }
}
