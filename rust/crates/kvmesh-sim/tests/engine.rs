//! One engine and small clusters, checked by hand against the timing model.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

use std::rc::Rc;

use kvmesh_eviction::Policy;
use kvmesh_sim::{
    cluster::{Cluster, Outcomes},
    formats,
    job::Shape,
    router::{Placement, Router},
    store::StoreShape,
    timing::Timing,
    trace::{Request, Trace, mix},
};
use proptest::prelude::*;

/// Places everything in turn.
struct InTurn {
    next: usize,
    prefills: usize,
    decodes: usize,
}

impl Router for InTurn {
    fn arrived(&mut self, _: f64, id: usize, _: &Request, placements: &mut Vec<Placement>) {
        let prefill = self.next % self.prefills;
        let decode = if self.decodes == 0 {
            prefill
        } else {
            self.prefills + self.next % self.decodes
        };
        self.next += 1;
        placements.push(Placement {
            request: id,
            prefill,
            decode,
        });
    }
    fn prefilled(&mut self, _: f64, _: usize, _: &mut Vec<Placement>) {}
    fn finished(&mut self, _: f64, _: usize, _: u32, _: &mut Vec<Placement>) {}
    fn stored(&mut self, _: f64, _: usize, _: &Rc<[u64]>, _: usize, _: usize) {}
    fn removed(&mut self, _: f64, _: usize, _: &[u64]) {}
}

fn cluster(aggregated: usize, prefill: usize, decode: usize, blocks: u32) -> Cluster {
    Cluster {
        aggregated,
        prefill,
        decode,
        shape: Shape {
            blocks,
            block_tokens: 100,
            pass_tokens: 1000,
            max_running: 16,
        },
        timing: Timing {
            prefill: [10.0, 0.1, 0.0],
            context: 0.0,
            decode: [5.0, 0.0, 0.0],
            stream: 0.0,
            transfer: [2.0, 0.01],
            onboard: [0.05, 0.1],
            network: 0.2,
            noise: 0.0,
        },
        store: None,
        event_lag_ms: 0.0,
        slowdowns: Vec::new(),
    }
}

fn request(arrival_ms: f64, prompt: u32, output: u32, owner: u64) -> Request {
    let chain = (0..u64::from(prompt / 100))
        .map(|block| mix(owner << 20 | block))
        .collect();
    Request {
        arrival_ms,
        prompt,
        output,
        chain,
        session: 0,
        delay_ms: None,
    }
}

fn run(cluster: &Cluster, requests: Vec<Request>) -> Outcomes {
    let trace = Trace::new(requests).unwrap();
    let prefills = if cluster.aggregated > 0 {
        cluster.aggregated
    } else {
        cluster.prefill
    };
    let mut router = InTurn {
        next: 0,
        prefills,
        decodes: cluster.decode,
    };
    cluster.run(&trace, &mut router, 1).unwrap()
}

#[test]
fn one_prompt_takes_its_chunks_and_its_tokens() {
    // 2,500 tokens in three passes, 10 ms each and 0.1 ms a token; then ten tokens of 5 ms.
    let outcomes = run(&cluster(1, 0, 0, 100), vec![request(3.0, 2500, 11, 1)]);
    let life = outcomes.timelines[0];
    assert!((life.first - 283.0).abs() < 1e-9, "{life:?}");
    assert!((life.ended - 333.0).abs() < 1e-9, "{life:?}");
    assert_eq!((life.cached, life.output), (0, 11));
    assert!((outcomes.busy_ms[0] - 330.0).abs() < 1e-9);
}

#[test]
fn what_the_device_evicted_comes_back_from_below_it() {
    // Ten blocks, evicted by ten others, and wanted again: nine of them, for one token has to be computed.
    let again = |host, nvme| {
        let mut cluster = cluster(1, 0, 0, 12);
        cluster.store = Some(StoreShape {
            workers: 1,
            host,
            nvme,
            network: 0,
            policy: Policy::Lru,
        });
        let requests =
            [(0.0, 1), (1e3, 2), (2e3, 1)].map(|(at, owner)| request(at, 1000, 1, owner));
        let life = run(&cluster, requests.to_vec()).timelines[2];
        (life.ttft(), life.cached, life.onboarded)
    };
    let near = |(ms, cached, onboarded): (f64, u32, u32), expected: (f64, u32, u32)| {
        (ms - expected.0).abs() < 1e-9 && (cached, onboarded) == (expected.1, expected.2)
    };
    // The device itself has two of the ten left, leading ones.
    assert!(near(again(0, 0), (90.0, 200, 0)), "{:?}", again(0, 0));
    // The pass computes 100 tokens in 20 ms, and brings up 700 of 0.05 ms each meanwhile.
    assert!(near(again(40, 0), (35.0, 900, 700)), "{:?}", again(40, 0));
    // The host tier has room for the second prompt only, the nvme tier for both.
    assert!(near(again(10, 40), (70.0, 900, 700)), "{:?}", again(10, 40));
}

#[test]
fn what_another_node_computed_comes_over_the_network() {
    let again = |network| {
        let mut cluster = cluster(2, 0, 0, 100);
        cluster.store = Some(StoreShape {
            workers: 1,
            host: 40,
            nvme: 0,
            network,
            policy: Policy::Lru,
        });
        // In turn: each on the other node.
        let requests = [0.0, 1e3].map(|at| request(at, 1000, 1, 1));
        let life = run(&cluster, requests.to_vec()).timelines[1];
        assert_eq!(life.placed, Some(1));
        (life.ttft(), life.cached, life.onboarded)
    };
    assert_eq!(again(0), (110.0, 0, 0));
    // 900 tokens of 0.2 ms, beside 20 ms of computing.
    assert_eq!(again(40), (180.0, 900, 900));
}

#[test]
fn a_cached_prefix_is_not_computed_again() {
    let requests = vec![
        request(0.0, 950, 1, 1),
        request(1000.0, 1950, 1, 1),
        request(2000.0, 900, 1, 1),
    ];
    let outcomes = run(&cluster(1, 0, 0, 100), requests);
    let cached: Vec<u32> = outcomes.timelines.iter().map(|life| life.cached).collect();
    // Of a prompt that is cached whole the last block is computed, for its logits.
    assert_eq!(cached, [0, 900, 800]);
    assert!((outcomes.timelines[1].ttft() - (20.0 + 105.0)).abs() < 1e-9);
}

#[test]
fn equal_prompts_share_one_pass() {
    let requests = vec![
        request(0.0, 450, 1, 1),
        request(0.0, 450, 1, 1),
        request(0.0, 450, 1, 1),
    ];
    let outcomes = run(&cluster(1, 0, 0, 100), requests);
    let cached: Vec<u32> = outcomes.timelines.iter().map(|life| life.cached).collect();
    // The first begins at once; the others come while its pass runs.
    assert_eq!(cached, [0, 400, 400]);
    assert!((outcomes.timelines[2].ttft() - (10.0 + 45.0 + 10.0 + 10.0)).abs() < 1e-9);
}

#[test]
fn a_stream_waits_for_prompts_and_an_arrival_for_the_pass_under_way() {
    let requests = vec![request(0.0, 100, 101, 1), request(32.0, 500, 1, 2)];
    let outcomes = run(&cluster(1, 0, 0, 100), requests);
    // The first token at 20 ms, then passes of 5 ms; the second prompt joins at 35 with 10 + 50 + 5 ms.
    assert!((outcomes.timelines[1].first - 100.0).abs() < 1e-9);
    assert!((outcomes.timelines[0].ended - (20.0 + 99.0 * 5.0 + 65.0)).abs() < 1e-9);
}

#[test]
fn a_split_request_pays_its_transfer() {
    let outcomes = run(&cluster(0, 1, 1, 100), vec![request(0.0, 500, 11, 1)]);
    let life = outcomes.timelines[0];
    assert!((life.first - (60.0 + 2.0 + 5.0)).abs() < 1e-9, "{life:?}");
    assert!((life.ended - (67.0 + 50.0)).abs() < 1e-9, "{life:?}");
}

#[test]
fn a_slowdown_slows_what_begins_after_it() {
    let mut slow = cluster(1, 0, 0, 100);
    slow.slowdowns = vec![(100.0, 0, 5.0)];
    let outcomes = run(
        &slow,
        vec![request(0.0, 500, 1, 1), request(200.0, 500, 1, 2)],
    );
    let times: Vec<f64> = outcomes.timelines.iter().map(|life| life.ttft()).collect();
    assert!(
        (times[0] - 60.0).abs() < 1e-9 && (times[1] - 300.0).abs() < 1e-9,
        "{times:?}"
    );
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    let trace = Trace::new(vec![request(0.0, 5000, 10, 1)]).unwrap();
    let mut router = InTurn {
        next: 0,
        prefills: 1,
        decodes: 0,
    };
    for bad in [
        cluster(1, 0, 0, 20),
        cluster(0, 1, 0, 100),
        cluster(0, 0, 0, 100),
    ] {
        assert!(bad.run(&trace, &mut router, 1).is_err());
    }
    assert!(Trace::new(Vec::new()).is_err());
    assert!(formats::lines("{\"timestamp\": 0}", 512).is_err());
    assert!(formats::azure("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2").is_err());
}

proptest! {
    /// Whatever comes, and however small the pool: every request ends, in order of its times, none is cached beyond its
    /// prompt, and twice the same gives the same.
    #[test]
    fn everything_ends(
        requests in prop::collection::vec((0u32..400, 1u32..1500, 1u32..300, 0u64..4), 1..60),
        split in any::<bool>(),
        blocks in 20u32..60,
    ) {
        let cluster = if split { cluster(0, 2, 1, blocks) } else { cluster(2, 0, 0, blocks) };
        let all = || requests.iter().map(|&(at, prompt, output, owner)| {
            request(f64::from(at), prompt, output, owner)
        }).collect::<Vec<_>>();
        let outcomes = run(&cluster, all());
        for (life, wanted) in outcomes.timelines.iter().zip(Trace::new(all()).unwrap().requests) {
            prop_assert!(life.arrived < life.first && life.first <= life.ended);
            prop_assert!(life.cached < wanted.prompt && life.output == wanted.output);
        }
        prop_assert_eq!(outcomes.timelines, run(&cluster, all()).timelines);
    }
}
