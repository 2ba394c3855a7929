//! What reports teach of work that not every request brings.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

mod common;

use common::{BLOCK, Bench, immediate, prompt};
use kvmesh_select::{Context, Found, Lookup, Placed, Progress, Role, WorkerId};

/// Of any prompt, a worker sees these leading blocks: on its device, down to host, to nvme, and in any tier.
struct Below(WorkerId, [u32; 4]);

impl Lookup for Below {
    fn matches(&mut self, _: &[u64], found: &mut Vec<Found>) {
        found.push(Found {
            worker: self.0,
            depths: self.1,
        });
    }
}

/// Places one prompt of 40 blocks, of which as many are there.
fn place(bench: &mut Bench, id: u64, worker: WorkerId, depths: [u32; 4]) -> Placed {
    let blocks: Vec<u64> = (0..40).map(|block| id << 32 | block).collect();
    let mut context = Context {
        now: bench.now,
        lookup: &mut Below(worker, depths),
        chance: &mut bench.chance,
        placed: &mut bench.placed,
        refused: &mut bench.refused,
    };
    bench
        .selector
        .submit(prompt(id, &blocks), &mut context)
        .unwrap();
    bench.placed.pop().unwrap()
}

/// Blocks come up in other times than was guessed, each tier in its own.
#[test]
fn onboarding_is_learned_tier_by_tier() {
    let truth = [0.02, 0.06, 0.15];
    let (mut bench, ids) = Bench::new(immediate(), &[Role::Aggregated]);
    // Blocks on each tier.
    let mixes = [
        [10, 0, 0],
        [20, 0, 0],
        [0, 20, 0],
        [0, 0, 10],
        [5, 10, 10],
        [0, 5, 20],
    ];
    let depths = |mix: [u32; 3]| [0, mix[0], mix[0] + mix[1], mix[0] + mix[1] + mix[2]];
    let onboard_ms = |mix: [u32; 3]| -> f64 {
        let blocks = mix.iter().zip(truth);
        blocks.map(|(&n, ms)| f64::from(n * BLOCK) * ms).sum()
    };
    for id in 1..=601 {
        // Every other prompt has nothing anywhere, and teaches what the rest of it takes.
        let mix = match id % 2 {
            0 => mixes[id as usize / 2 % mixes.len()],
            _ => [0; 3],
        };
        let placed = place(&mut bench, id, ids[0], depths(mix));
        let cached: u32 = mix.iter().sum();
        bench.now += 10.0 + 0.1 * f64::from((40 - cached) * BLOCK) + onboard_ms(mix);
        let computed = Progress {
            prefilled: true,
            output_tokens: 0,
        };
        bench.with(|selector, context| selector.progress(placed.lease, computed, context));
        bench.end(placed.lease);
        bench.now += 10.0;
    }
    let (_, _, laws) = &bench.selector.rates()[0];
    let law = laws.iter().find(|law| law.name == "onboard").unwrap();
    assert_eq!(law.quality.count, 300);
    for ((name, learned), true_ms) in law.coefficients.iter().zip(truth) {
        assert!((learned / true_ms - 1.0).abs() < 0.15, "{name}: {learned}");
    }
    // And decisions count with it.
    for mix in mixes {
        let placed = place(&mut bench, 1_000, ids[0], depths(mix));
        let ratio = placed.winner.terms.onboard / onboard_ms(mix);
        assert!((0.85..1.15).contains(&ratio), "{mix:?}: {ratio}");
        bench.end(placed.lease);
    }
}
