//! Token hit rates and speed of the eviction policies on a trace:
//!
//!     cargo run --release --example eviction -- TRACE SIZES POLICIES [ACCURACY] < REQUESTS
//!
//! TRACE is the name of a made-up trace, or `-`: one request a line of standard input, as seconds, prompt tokens, and the
//! ids of its blocks of 512 tokens. SIZES (blocks) and POLICIES have commas between them. With ACCURACY, requests hint
//! whether they return, and so many percent of them are right. Prints `POLICY SIZE HIT_RATE TOUCHES_PER_SECOND` lines;
//! the second half of the requests is counted, and the speed is that of one core, by CPU time.

mod optimum;
mod synthetic;

use std::collections::HashMap;
use std::io::stdin;

use kvmesh_eviction::simulate::{Request, simulate};
use kvmesh_eviction::{EvictionPolicy, Hints, Key, Policy};
use optimum::Optimum;
use synthetic::{BLOCK_TOKENS, Random, TRACES};

/// Blocks that the made-up traces are about.
const SCALE: u64 = 1000;
/// Times a trace is repeated to measure speed.
const ROUNDS: usize = 4;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, sizes, policies, rest @ ..] = &arguments[..] else {
        panic!("TRACE SIZES POLICIES [ACCURACY] are needed");
    };
    let mut trace = load(name);
    if let [accuracy] = rest {
        hint(&mut trace, accuracy.parse().expect("a percentage"));
    }
    let repeated = repeated(&trace);
    for policy in policies.split(',') {
        for size in sizes.split(',') {
            let capacity = size.parse().expect("a number of blocks");
            let run = |trace: &[Request], counted_from| {
                let policy = build(policy, trace);
                simulate(trace, BLOCK_TOKENS, policy, capacity, counted_from)
            };
            let outcome = run(&trace, trace.len() / 2);
            let begun = cpu_seconds();
            let touches = run(&repeated, 0).touches;
            let speed = touches as f64 / (cpu_seconds() - begun);
            println!("{policy} {size} {:.4} {speed:.0}", outcome.hit_rate());
        }
    }
}

fn load(name: &str) -> Vec<Request> {
    if name == "-" {
        return stdin()
            .lines()
            .map(|line| parse(&line.expect("a line")))
            .collect();
    }
    let known = TRACES.iter().find(|trace| trace.0 == name);
    known.expect("the name of a made-up trace").1(SCALE)
}

fn parse(line: &str) -> Request {
    let mut numbers = line.split_ascii_whitespace();
    let mut number = || numbers.next().expect("seconds and tokens");
    Request {
        seconds: number().parse().expect("seconds"),
        tokens: number().parse().expect("tokens"),
        chain: numbers
            .map(|id| Key(id.parse().expect("a block's id")))
            .collect(),
        hints: Hints::default(),
    }
}

fn build(policy: &str, trace: &[Request]) -> Box<dyn EvictionPolicy> {
    match policy {
        "optimum" => Box::new(Optimum::new(trace)),
        name => name.parse::<Policy>().expect("a policy").build(),
    }
}

/// Gives every request the hint whether its conversation returns: whether its last whole block is used again. The last
/// block of a chain may be filled in part, and is then another block in the next turn.
fn hint(trace: &mut [Request], accuracy: u64) {
    let mut last_use: HashMap<Key, usize> = HashMap::new();
    for (number, request) in trace.iter().enumerate() {
        last_use.extend(request.chain.iter().map(|&key| (key, number)));
    }
    let mut random = Random(8);
    for (number, request) in trace.iter_mut().enumerate() {
        let ends = request.chain.iter().rev().take(2);
        let returns = ends.into_iter().any(|key| last_use[key] > number);
        request.hints.returns = Some(returns == random.chance(accuracy));
    }
}

/// The requests of the trace over and over, one after another, so that growing tables count for little.
fn repeated(trace: &[Request]) -> Vec<Request> {
    let span = trace.last().map_or(0.0, |request| request.seconds);
    let round = |number: usize| {
        trace.iter().cloned().map(move |request| Request {
            seconds: request.seconds + span * number as f64,
            ..request
        })
    };
    (0..ROUNDS).flat_map(round).collect()
}

/// CPU time of this thread: what others do on the machine does not count.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux");
    let nanoseconds = stat
        .split(' ')
        .next()
        .and_then(|n| n.parse::<f64>().ok())
        .expect("nanoseconds");
    nanoseconds / 1e9
}
