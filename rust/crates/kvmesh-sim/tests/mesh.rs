//! kvmesh's router on simulated clusters.
#![allow(clippy::unwrap_used)] // a failing helper fails its test

use std::ops::Range;

use kvmesh_eviction::Policy;
use kvmesh_select::{Admission, Config, PolicyName};
use kvmesh_sim::{
    cluster::{Cluster, Outcomes},
    formats,
    job::Shape,
    mesh::Mesh,
    report::{Figures, Slo},
    store::StoreShape,
    synthetic::Synthetic,
    timeline::Timeline,
    timing::Timing,
    trace::Trace,
};

fn cluster(aggregated: usize, prefill: usize, decode: usize) -> Cluster {
    Cluster {
        aggregated,
        prefill,
        decode,
        shape: Shape {
            blocks: 4096,
            block_tokens: 64,
            pass_tokens: 8192,
            max_running: 256,
        },
        timing: Timing::default(),
        store: None,
        event_lag_ms: 0.0,
        slowdowns: Vec::new(),
    }
}

fn traffic(requests: usize, per_second: f64, seed: u64) -> Trace {
    let shape = Synthetic {
        requests,
        per_second,
        systems: 20,
        system_tokens: 1024,
        turn_tokens: 600.0,
        output_tokens: 60.0,
        turns: 5.0,
        block_tokens: 64,
    };
    shape.generate(seed).unwrap()
}

fn run(
    cluster: &Cluster,
    trace: &Trace,
    config: Config,
    error: f64,
    seed: u64,
) -> (Outcomes, Figures) {
    let mut mesh = Mesh::new(cluster, config, trace.requests.len(), error, seed).unwrap();
    let outcomes = cluster.run(trace, &mut mesh, seed).unwrap();
    let selector = mesh.selector();
    assert!(selector.leases().is_empty() && selector.held() == 0);
    assert_eq!(selector.leases().expired(), 0);
    let figures = Figures::of(cluster, &outcomes, trace, Slo::default());
    (outcomes, figures)
}

fn with(policy: PolicyName) -> Config {
    Config {
        policy,
        ..Config::default()
    }
}

#[test]
fn a_store_below_the_devices_is_used_and_priced() {
    let mut cluster = cluster(4, 0, 0);
    cluster.shape.blocks = 512;
    let trace = traffic(1500, 8.0, 3);
    let (_, without) = run(&cluster, &trace, Config::default(), 0.0, 5);
    cluster.store = Some(StoreShape {
        workers: 2,
        host: 8192,
        nvme: 0,
        network: 0,
        policy: Policy::Default,
    });
    cluster.event_lag_ms = 50.0;
    let (_, with_host) = run(&cluster, &trace, Config::default(), 0.0, 5);
    assert_eq!(without.onboarded, 0.0);
    assert!(with_host.onboarded > 0.1, "{with_host:?}");
    assert!(
        with_host.reuse > without.reuse + 0.05,
        "{with_host:?} {without:?}"
    );
    assert!(with_host.ttft_ms.mean < without.ttft_ms.mean);
    // A router that does not look at what is cached meets it by chance only.
    let (_, blind) = run(&cluster, &trace, with(PolicyName::RoundRobin), 0.0, 5);
    assert!(blind.reuse < with_host.reuse, "{blind:?} {with_host:?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for cluster in [cluster(4, 0, 0), cluster(0, 3, 2), cluster(2, 2, 1)] {
        let trace = traffic(1500, 20.0, 3);
        let first = run(&cluster, &trace, Config::default(), 0.1, 5);
        let again = run(&cluster, &trace, Config::default(), 0.1, 5);
        assert_eq!(first.0.timelines, again.0.timelines);
        assert_ne!(
            first.0.timelines,
            run(&cluster, &trace, Config::default(), 0.1, 6).0.timelines
        );
    }
}

#[test]
fn every_policy_serves_all() {
    let trace = traffic(1500, 20.0, 1);
    for policy in PolicyName::ALL {
        for cluster in [cluster(4, 0, 0), cluster(0, 3, 2)] {
            let (outcomes, _) = run(&cluster, &trace, with(policy), 0.0, 1);
            let busy = outcomes.busy_ms.iter().filter(|busy| **busy > 0.0).count();
            assert_eq!(busy, cluster.workers(), "{policy} left a worker idle");
        }
    }
}

#[test]
fn kv_beats_the_blind() {
    let trace = traffic(4000, 60.0, 2);
    let figures = |policy| run(&cluster(6, 0, 0), &trace, with(policy), 0.0, 2).1;
    let kv = figures(PolicyName::Kv);
    for policy in [
        PolicyName::RoundRobin,
        PolicyName::Random,
        PolicyName::LeastLoaded,
    ] {
        let blind = figures(policy);
        assert!(
            kv.ttft_ms.mean < 0.9 * blind.ttft_ms.mean,
            "{policy}: {kv:?} {blind:?}"
        );
        assert!(kv.reuse > blind.reuse);
    }
}

#[test]
fn misread_rates_cost_little() {
    let trace = traffic(4000, 60.0, 2);
    let exact = run(&cluster(6, 0, 0), &trace, Config::default(), 0.0, 2).1;
    for error in [0.1, 0.3] {
        let misread = run(&cluster(6, 0, 0), &trace, Config::default(), error, 2).1;
        assert!(
            misread.ttft_ms.mean < 1.05 * exact.ttft_ms.mean,
            "{error}: {misread:?} {exact:?}"
        );
    }
}

#[test]
fn lagging_events_and_noise_cost_little() {
    let trace = traffic(4000, 60.0, 2);
    let exact = run(&cluster(6, 0, 0), &trace, Config::default(), 0.0, 2).1;
    let mut worse = cluster(6, 0, 0);
    worse.event_lag_ms = 500.0;
    worse.timing.noise = 0.3;
    let found = run(&worse, &trace, Config::default(), 0.0, 2).1;
    assert!(
        found.ttft_ms.mean < 1.25 * exact.ttft_ms.mean,
        "{found:?} {exact:?}"
    );
}

/// Of the requests that arrived in some milliseconds, the part that went a way.
fn share(outcomes: &Outcomes, during: Range<f64>, went: impl Fn(&Timeline) -> bool) -> f64 {
    let all = outcomes.timelines.iter();
    let all: Vec<_> = all.filter(|life| during.contains(&life.arrived)).collect();
    let there = all.iter().filter(|life| went(life)).count();
    there as f64 / all.len() as f64
}

/// A worker that goes five times slower loses its share within ten seconds.
#[test]
fn a_slow_worker_loses_its_share() {
    for config in [
        Config::default(),
        Config {
            joint: false,
            ..Config::default()
        },
    ] {
        let mut slow = cluster(8, 0, 0);
        slow.slowdowns = vec![(20_000.0, 3, 5.0)];
        let trace = traffic(3000, 50.0, 4);
        let (outcomes, _) = run(&slow, &trace, config, 0.0, 4);
        let share = |from, to| share(&outcomes, from..to, |life| life.placed == Some(3));
        let (before, after) = (share(5_000.0, 20_000.0), share(30_000.0, 60_000.0));
        assert!((0.08..0.18).contains(&before), "{before}");
        assert!(after < 0.4 * before, "{before} -> {after}");
    }
}

/// The same of halves: a decode worker, which computes no prompts, and a prefill worker.
#[test]
fn a_slow_half_loses_its_share() {
    for (joint, worker) in [(true, 7), (false, 7), (true, 2)] {
        let mut slow = cluster(0, 5, 4);
        slow.slowdowns = vec![(20_000.0, worker, 5.0)];
        let config = Config {
            joint,
            ..Config::default()
        };
        let trace = traffic(3000, 50.0, 4);
        let (outcomes, _) = run(&slow, &trace, config, 0.0, 4);
        let there = |life: &Timeline| [life.placed, life.decoded].contains(&Some(worker));
        let share = |from, to| share(&outcomes, from..to, there);
        let (before, after) = (share(5_000.0, 20_000.0), share(30_000.0, 60_000.0));
        assert!((0.15..0.35).contains(&before), "{worker}: {before}");
        // Requests that pile up there push others away without that anything is learned: to a third.
        assert!(after < 0.1 * before, "{worker}: {before} -> {after}");
    }
}

/// Far beyond what the workers can do, with bounds: who is not refused is served in time, and nothing is left over.
#[test]
fn a_storm_is_refused() {
    let trace = traffic(6000, 400.0, 5);
    for policy in PolicyName::ALL {
        for cluster in [cluster(2, 0, 0), cluster(0, 1, 1)] {
            let config = Config {
                admission: Admission {
                    max_held: 100,
                    max_wait_ms: 3_000.0,
                    ..Admission::default()
                },
                ..with(policy)
            };
            let (outcomes, bounded) = run(&cluster, &trace, config, 0.0, 5);
            let off = Config {
                admission: Admission::off(),
                ..with(policy)
            };
            let (_, all) = run(&cluster, &trace, off, 0.0, 5);
            assert_eq!((all.refused, all.requests), (0, 6000));
            assert!(bounded.refused > 1000, "{policy}: {bounded:?}");
            assert_eq!(bounded.requests + bounded.refused, 6000);
            assert!(
                bounded.ttft_ms.p95 < 0.5 * all.ttft_ms.p95,
                "{policy}: {bounded:?} {all:?}"
            );
            let refused = outcomes.timelines.iter().filter(|life| life.refused);
            assert!(
                refused
                    .clone()
                    .all(|life| life.placed.is_none() && life.output == 0)
            );
        }
    }
}

/// The simulator against the round-robin figures that Dynamo's own replay of this trace has.
#[test]
fn the_model_reproduces_known_figures() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../../../shared/traces/mooncake/conversation_trace.jsonl");
    if !path.exists() {
        eprintln!("skipped: no trace at {}", path.display());
        return;
    }
    let mut shape = cluster(8, 0, 0);
    shape.shape.block_tokens = 512;
    let trace = formats::read(&path, 512).unwrap();
    let (_, figures) = run(&shape, &trace, with(PolicyName::RoundRobin), 0.0, 0);
    assert!(
        (figures.ttft_ms.mean / 313.0 - 1.0).abs() < 0.03,
        "{figures:?}"
    );
    assert!(
        (figures.ttft_ms.p95 / 995.0 - 1.0).abs() < 0.03,
        "{figures:?}"
    );
}
