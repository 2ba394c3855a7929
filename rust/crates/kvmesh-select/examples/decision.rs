//! Time of one decision in process, prompts of 16 blocks: `cargo run --release -p kvmesh-select --example decision`.
//! A cycle is a placement, its report that the prompt is computed, and its end; every worker has live streams, and
//! an eighth of them the prompt's first blocks. One line of JSON for each number of workers: microseconds.

use std::time::Instant;

use kvmesh_select::{
    Config, Context, Found, Lookup, Probe, Progress, Request, Role, Selector, WorkerId, WorkerSpec,
};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

const BLOCKS: u64 = 16;
const BLOCK_TOKENS: u32 = 64;
const ROUNDS: u64 = 20_000;

/// An index in which every eighth worker has half of any prompt.
struct Half(Vec<WorkerId>);

impl Lookup for Half {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        let depths = [blocks.len() as u32 / 2; 4];
        found.extend(
            self.0
                .iter()
                .step_by(8)
                .map(|&worker| Found { worker, depths }),
        );
    }
}

fn request(id: u64) -> Request {
    Request {
        id,
        prompt_tokens: BLOCKS as u32 * BLOCK_TOKENS + 1,
        blocks: (0..BLOCKS).map(|block| id << 8 | block).collect(),
        ..Request::default()
    }
}

fn main() {
    for workers in [8, 64, 512] {
        let mut selector = Selector::new(Config {
            block_tokens: BLOCK_TOKENS,
            gather_ms: 0.0,
            // As the service has it.
            explained: 16,
            ..Config::default()
        });
        let spec = |key| WorkerSpec {
            key,
            role: Role::Aggregated,
            class: "alike".into(),
            pool: 0,
            blocks: 8192,
            pass_tokens: 8192,
            probe: Probe::default(),
            offers: Vec::new(),
        };
        let mut lookup = Half(
            (0..workers)
                .map(|key| selector.add_worker(&spec(key)))
                .collect(),
        );
        let mut chance = ChaCha8Rng::seed_from_u64(1);
        let mut placed = Vec::new();
        let mut refused = Vec::new();
        let mut times = Vec::new();
        let mut live = std::collections::VecDeque::new();
        let mut now = 0.0;
        for id in 1..=ROUNDS + 4 * workers {
            now += 1e3 / workers as f64;
            let wanted = request(id);
            let mut context = Context {
                now,
                lookup: &mut lookup,
                chance: &mut chance,
                placed: &mut placed,
                refused: &mut refused,
            };
            let start = Instant::now();
            let answer = selector.submit(wanted, &mut context);
            let taken = start.elapsed();
            assert!(answer.is_ok());
            for one in placed.drain(..) {
                live.push_back(one.lease);
            }
            let mut context = Context {
                now: now + 0.2,
                lookup: &mut lookup,
                chance: &mut chance,
                placed: &mut placed,
                refused: &mut refused,
            };
            let start = Instant::now();
            if let Some(&lease) = live.back() {
                let progress = Progress {
                    prefilled: true,
                    output_tokens: 1,
                };
                selector.progress(lease, progress, &mut context);
            }
            if live.len() as u64 > 4 * workers {
                if let Some(lease) = live.pop_front() {
                    selector.end(lease, &mut context);
                }
                times.push((
                    taken.as_secs_f64() * 1e6,
                    (taken + start.elapsed()).as_secs_f64() * 1e6,
                ));
            }
        }
        let rank = |mut of: Vec<f64>, part: f64| {
            of.sort_by(f64::total_cmp);
            of[(of.len() as f64 * part) as usize]
        };
        let (decisions, cycles): (Vec<f64>, Vec<f64>) = times.into_iter().unzip();
        println!(
            "{{\"workers\": {workers}, \"decision_p50_us\": {:.2}, \"decision_p99_us\": {:.2}, \"cycle_p50_us\": {:.2}}}",
            rank(decisions.clone(), 0.5),
            rank(decisions, 0.99),
            rank(cycles, 0.5)
        );
    }
}
