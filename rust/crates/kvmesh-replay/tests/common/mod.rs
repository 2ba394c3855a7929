//! A driver of a selector, and a random program that does everything to it.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};

use kvmesh_replay::{Answer, Driver, Input, Log, LogConfig};
use kvmesh_select::{
    Admission, Candidate, Config, Found, Lookup, Placed, Policy, PolicyName, Probe, Report,
    Request, Role, Selector, WorkerId, WorkerSpec,
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use tempfile::TempDir;

pub const BLOCK: u32 = 64;
/// What every other worker offers.
const RARE: u64 = 77;

/// Blocks by worker.
#[derive(Default)]
pub struct Table(pub BTreeMap<WorkerId, BTreeSet<u64>>);

impl Lookup for Table {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        for (&worker, held) in &self.0 {
            let depth = blocks
                .iter()
                .take_while(|hash| held.contains(*hash))
                .count() as u32;
            if depth > 0 {
                let depths = [depth / 2, depth, depth, depth];
                found.push(Found { worker, depths });
            }
        }
    }
}

pub fn immediate() -> Config {
    Config {
        joint: false,
        ..Config::default()
    }
}

/// Few may wait, and not for long.
pub fn crowded() -> Config {
    Config {
        lease_ttl_ms: 2_000.0,
        admission: Admission {
            backlog_ms: 50.0,
            max_held: 8,
            max_wait_ms: 400.0,
            ..Admission::default()
        },
        ..Config::default()
    }
}

pub fn log_config(directory: &TempDir, max_bytes: u64, max_files: usize) -> LogConfig {
    LogConfig {
        directory: directory.path().to_owned(),
        model: "tiny".into(),
        run: "one".into(),
        epoch: 1_000.0,
        max_bytes,
        max_files,
        max_queued: 64 << 20,
    }
}

pub fn log(directory: &TempDir, max_bytes: u64, max_files: usize) -> Log {
    Log::open(log_config(directory, max_bytes, max_files)).expect("a log")
}

struct Odd(u64);

impl Policy for Odd {
    fn costs(
        &mut self,
        _: &Request,
        candidates: &[Candidate],
        chance: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    ) {
        // Remembers, and takes chances: neither is there in a replay.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let _ = chance;
        costs.extend((0..candidates.len()).map(|at| ((self.0 >> (at + 7)) % 5) as f64));
    }
}

pub fn odd() -> Box<dyn Policy> {
    Box::new(Odd(1))
}

pub struct Program {
    pub driver: Driver<Table>,
    pub now: f64,
    pub placed: u64,
    pub refused: u64,
    /// Whether placements are kept.
    pub keep: bool,
    pub kept: Vec<Placed>,
    pub external: bool,
    /// Whether requests name policies.
    pub mixed: bool,
    chance: ChaCha8Rng,
    roles: Vec<Role>,
    workers: Vec<WorkerId>,
    leases: Vec<(u64, u32)>,
    requests: u64,
}

impl Program {
    pub fn new(config: Config, roles: &[Role], seed: u64) -> Self {
        let config = Config {
            block_tokens: BLOCK,
            ..config
        };
        let mut program = Self {
            driver: Driver::new(Selector::new(config), Table::default(), seed),
            now: 0.0,
            placed: 0,
            refused: 0,
            keep: false,
            kept: Vec::new(),
            external: false,
            mixed: true,
            chance: ChaCha8Rng::seed_from_u64(seed),
            roles: roles.to_vec(),
            workers: Vec::new(),
            leases: Vec::new(),
            requests: 0,
        };
        for at in 0..roles.len() {
            let worker = program.join(at);
            program.workers.push(worker);
        }
        program
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.chance.next_u64() % limit.max(1) as u64) as usize
    }

    fn join(&mut self, at: usize) -> WorkerId {
        let probe = Probe {
            prefill: vec![(100, 0, 20.0), (1_000, 0, 110.0), (4_000, 0, 410.0)],
            ..Probe::default()
        };
        let spec = WorkerSpec {
            key: at as u64,
            role: self.roles[at],
            class: "test".into(),
            pool: 0,
            blocks: 400,
            pass_tokens: 2_048,
            probe,
            offers: if at % 2 == 0 { vec![RARE] } else { Vec::new() },
        };
        let name = format!("worker-{at}");
        match self.driver.call(self.now, Input::AddWorker { name, spec }) {
            Answer::Worker(id) => id,
            other => panic!("{other:?}"),
        }
    }

    fn request(&mut self) -> Request {
        self.requests += 1;
        // Few families of prompts, so that they share prefixes.
        let (family, depth) = (self.below(6) as u64, 1 + self.below(20) as u64);
        let blocks: Box<[u64]> = (1..=depth).map(|at| family * 1_000 + at).collect();
        let policies = [
            PolicyName::RoundRobin,
            PolicyName::Session,
            PolicyName::PowerOfTwo,
        ];
        let policy = match self.below(12) {
            at @ 0..3 if self.mixed => Some(policies[at]),
            3 | 4 if self.external => Some(PolicyName::External(0)),
            _ => None,
        };
        let exclude = (self.below(20) == 0).then(|| self.workers[0]);
        Request {
            id: self.requests,
            prompt_tokens: depth as u32 * BLOCK + self.below(64) as u32,
            blocks,
            session: self.below(4) as u64,
            tenant: self.below(3) as u64,
            priority: self.below(3) as i32,
            deadline: (self.below(8) == 0).then(|| self.now + 100.0 + self.below(900) as f64),
            exclude: exclude.into_iter().collect(),
            needs: (self.requests % 10 == 0)
                .then_some(RARE)
                .into_iter()
                .collect(),
            policy,
            explain: self.below(5) == 0,
        }
    }

    /// So many steps, each at random.
    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.now += self.below(4_000) as f64 / 100.0;
            match self.below(100) {
                0..30 => {
                    let request = self.request();
                    let name = format!("request-{}", request.id);
                    self.driver.call(self.now, Input::Submit { name, request });
                }
                30..34 => {
                    let request = self.requests - self.below(6).min(self.requests as usize) as u64;
                    self.driver.call(self.now, Input::Withdraw { request });
                }
                34..66 => self.report(),
                66..76 => {
                    if !self.leases.is_empty() {
                        let at = self.below(self.leases.len());
                        let (lease, _) = self.leases.swap_remove(at);
                        self.driver.call(self.now, Input::End { lease });
                    }
                }
                76..86 => self.event(),
                86 => {
                    let at = self.below(self.workers.len());
                    let worker = self.workers[at];
                    self.driver.lookup.0.remove(&worker);
                    self.driver.call(self.now, Input::RemoveWorker { worker });
                    self.workers[at] = self.join(at);
                }
                _ => {
                    self.driver.call(self.now, Input::Tick);
                }
            }
            self.collect();
        }
    }

    fn report(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let at = self.below(self.leases.len());
        let tokens = self.below(40) as u32;
        let (lease, output) = &mut self.leases[at];
        *output += tokens;
        let (lease, output_tokens) = (*lease, *output);
        let report = Report {
            lease,
            prefilled: true,
            output_tokens,
            transfer_ms: 1.5,
            ended: false,
        };
        // Alone as routers wrote it once; with others, one of which may be gone, as they do now.
        if self.below(3) == 0 {
            let progress = Input::Progress {
                lease,
                prefilled: true,
                output_tokens,
                transfer_ms: 1.5,
            };
            self.driver.call(self.now, progress);
            return;
        }
        let mut reports = vec![report];
        if self.leases.len() > 1 {
            let at = self.below(self.leases.len());
            let (lease, output_tokens) = self.leases.swap_remove(at);
            let ended = Report {
                lease,
                output_tokens,
                ended: true,
                ..report
            };
            reports.extend([ended, ended]);
        }
        self.driver.call(self.now, Input::Report { reports });
    }

    fn event(&mut self) {
        let at = self.below(self.workers.len());
        let worker = self.workers[at];
        let family = self.below(6) as u64;
        let depth = 1 + self.below(20) as u64;
        let hashes: Vec<u64> = (1..=depth).map(|at| family * 1_000 + at).collect();
        let held = self.driver.lookup.0.entry(worker).or_default();
        match self.chance.next_u64() % 10 {
            0..6 => {
                held.extend(&hashes);
                self.driver.stored(self.now, worker, &hashes);
            }
            6..9 => {
                held.retain(|hash| !hashes.contains(hash));
                self.driver.removed(self.now, worker, &hashes);
            }
            _ => {
                held.clear();
                self.driver.call(self.now, Input::Cleared { worker });
            }
        }
    }

    fn collect(&mut self) {
        for placed in std::mem::take(&mut self.driver.placed) {
            self.placed += 1;
            self.leases.push((placed.lease, 0));
            if self.keep {
                self.kept.push(placed);
            }
        }
        self.refused += self.driver.refused.drain(..).count() as u64;
    }
}
