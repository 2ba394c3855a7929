//! A simulation from the command line, also of binaries that add routers of their own to it.

use std::{collections::BTreeMap, path::PathBuf};

use clap::Parser;
use kvmesh_eviction::Policy;
use kvmesh_select::{Admission, Config, PolicyName, Prices};
use serde::Serialize;

use crate::{
    Error, Result,
    cluster::Cluster,
    formats,
    job::Shape,
    mesh::Mesh,
    rates::Rates,
    report::{Figures, Slo},
    router::Router,
    say,
    store::StoreShape,
    synthetic::Synthetic,
    timing::Timing,
    trace::Trace,
    watch::{Unwatched, Watch},
};

/// Simulates a mesh: a trace, engines, and one or more routers.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// A trace: Mooncake, aiperf (its mooncake_trace or its profile_export.jsonl) or LLMServingSim (.jsonl), or Azure
    /// (.csv). Without it, synthetic conversations.
    #[arg(long, value_name = "FILE", help_heading = "Traffic")]
    pub trace: Option<PathBuf>,
    /// Synthetic requests.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10_000,
        help_heading = "Traffic"
    )]
    pub requests: usize,
    /// Synthetic requests a second, Poisson.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 10.0,
        help_heading = "Traffic"
    )]
    pub per_second: f64,
    /// Synthetic system prompts; the k-th is chosen with a probability falling as 1/k.
    #[arg(long, value_name = "N", default_value_t = 50, help_heading = "Traffic")]
    pub systems: usize,
    /// Tokens of a synthetic system prompt.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 2048,
        help_heading = "Traffic"
    )]
    pub system_tokens: u32,
    /// Mean tokens that a synthetic turn adds, exponential.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 800.0,
        help_heading = "Traffic"
    )]
    pub turn_tokens: f64,
    /// Mean output tokens of a synthetic turn, exponential.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 200.0,
        help_heading = "Traffic"
    )]
    pub output_tokens: f64,
    /// Mean turns of a synthetic conversation, geometric.
    #[arg(
        long,
        value_name = "X",
        default_value_t = 5.0,
        help_heading = "Traffic"
    )]
    pub turns: f64,
    /// Aggregated workers.
    #[arg(long, default_value_t = 8)]
    pub workers: usize,
    /// Prefill workers; with --decode, in place of aggregated ones.
    #[arg(long, default_value_t = 0, requires = "decode")]
    pub prefill: usize,
    /// Decode workers.
    #[arg(long, default_value_t = 0, requires = "prefill")]
    pub decode: usize,
    /// What `kvmesh simulate fit` wrote: timing and sizes of the engines.
    #[arg(long, value_name = "FILE")]
    pub rates: Option<PathBuf>,
    /// Blocks in a worker's pool [default: 4096, or those of --rates].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub blocks: Option<u32>,
    /// Tokens in a block; a Mooncake trace has one hash a block [default: 512, or those of --rates].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub block_tokens: Option<u32>,
    /// Tokens in a pass [default: 8192, or those of --rates].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub pass_tokens: Option<u32>,
    /// Requests a worker runs at once [default: 256, or those of --rates].
    #[arg(long, value_name = "N")]
    pub max_running: Option<usize>,
    /// Blocks of a node's host tier; 0: engines have nothing below their devices.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        help_heading = "Tiers below the device"
    )]
    pub host_blocks: u32,
    /// Blocks of a node's nvme tier.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        requires = "host_blocks",
        help_heading = "Tiers below the device"
    )]
    pub nvme_blocks: u32,
    /// Blocks of the network tier, which all nodes share.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        requires = "host_blocks",
        help_heading = "Tiers below the device"
    )]
    pub network_blocks: u32,
    /// Workers of a node, which share its store.
    #[arg(long, value_name = "N", default_value = "8", value_parser = at_least_one, help_heading = "Tiers below the device")]
    pub node_workers: u32,
    /// Which blocks leave a full tier: default, class-index, lru, gdsf, s3-fifo.
    #[arg(
        long,
        value_name = "POLICY",
        default_value = "default",
        help_heading = "Tiers below the device"
    )]
    pub eviction: Policy,
    /// Times the trace's own rate.
    #[arg(long, default_value_t = 1.0)]
    pub rate: f64,
    /// Milliseconds over which every arrival is spread, before the rate applies.
    #[arg(long, default_value_t = 0.0)]
    pub spread_ms: f64,
    /// Milliseconds until routers hear of a cached or evicted block.
    #[arg(long, default_value_t = 0.0)]
    pub event_lag_ms: f64,
    /// Share by which passes vary.
    #[arg(long, default_value_t = 0.0)]
    pub noise: f64,
    /// Share by which kvmesh's router misreads each worker's times.
    #[arg(long, default_value_t = 0.0)]
    pub rate_error: f64,
    /// A change of speed, as MILLISECONDS:WORKER:FACTOR; may be repeated.
    #[arg(long, value_parser = slowdown)]
    pub slow: Vec<(f64, usize, f64)>,
    /// Softens kvmesh's choice.
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// What cost is worth to others in kvmesh's choice, as WORK,STREAM,FRESH,TOKEN,EVICT.
    #[arg(long, value_parser = prices)]
    pub prices: Option<Prices>,
    /// Requests that kvmesh's routers let wait while no worker has room; without it, all are placed at once.
    #[arg(long, value_name = "N", help_heading = "Admission")]
    pub max_held: Option<usize>,
    /// Milliseconds that they wait at most.
    #[arg(
        long,
        value_name = "MS",
        requires = "max_held",
        help_heading = "Admission"
    )]
    pub max_wait_ms: Option<f64>,
    /// A good request's longest time to the first token.
    #[arg(long, value_name = "MS", help_heading = "Objective")]
    pub slo_ttft_ms: Option<f64>,
    /// A good request's longest mean time between tokens.
    #[arg(long, value_name = "MS", help_heading = "Objective")]
    pub slo_itl_ms: Option<f64>,
    /// A good request's longest time to the last token.
    #[arg(long, value_name = "MS", help_heading = "Objective")]
    pub slo_e2e_ms: Option<f64>,
    /// Routers, in turn: a policy of kvmesh's, or `kv-immediate`, kv without joint placement.
    #[arg(long = "router", default_value = "kv", value_delimiter = ',')]
    pub routers: Vec<String>,
    /// First seed.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Runs of each router, with a seed each.
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// Print one JSON object in place of a table.
    #[arg(long)]
    pub json: bool,
}

pub(crate) fn at_least_one(text: &str) -> std::result::Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("`{text}` is not a number")),
    }
}

fn slowdown(text: &str) -> std::result::Result<(f64, usize, f64), String> {
    let parts: Vec<&str> = text.split(':').collect();
    let [at, worker, factor] = parts[..] else {
        return Err("not MILLISECONDS:WORKER:FACTOR".into());
    };
    let wrong = |what: &str| format!("`{what}` is not a number");
    Ok((
        at.parse().map_err(|_| wrong(at))?,
        worker.parse().map_err(|_| wrong(worker))?,
        factor.parse().map_err(|_| wrong(factor))?,
    ))
}

fn prices(text: &str) -> std::result::Result<Prices, String> {
    let values: std::result::Result<Vec<f64>, _> = text.split(',').map(str::parse).collect();
    match values.as_deref() {
        Ok(&[work, stream, fresh, token, evict]) => Ok(Prices {
            work,
            stream,
            fresh,
            token,
            evict,
        }),
        _ => Err("not five numbers: WORK,STREAM,FRESH,TOKEN,EVICT".into()),
    }
}

/// One run of each router and seed.
#[derive(Serialize)]
struct Runs {
    requests: usize,
    workers: usize,
    objective: Slo,
    routers: BTreeMap<String, Vec<Figures>>,
}

/// Makes a router by a name that kvmesh has none for; (name, cluster, seed).
pub type Maker<'a> = &'a dyn Fn(&str, &Cluster, u64) -> Option<Box<dyn Router>>;

/// Makes a watch for the run of this name.
pub type Watcher<'a, 'w> = &'a mut dyn FnMut(&str) -> Box<dyn Watch + 'w>;

fn unknown(name: &str) -> String {
    let names = PolicyName::ALL.map(PolicyName::name).join(", ");
    format!("unknown router `{name}`; known: {names}, kv-immediate")
}

impl Args {
    /// Runs all routers with all seeds, and prints what came of it. The routers take turns, seed by seed.
    pub fn run(&self, others: Maker<'_>) -> Result<()> {
        self.run_watched(others, &mut |_| Box::new(Unwatched))
    }

    /// The same, with a watch for each run, made from its name.
    pub fn run_watched(&self, others: Maker<'_>, watch: Watcher<'_, '_>) -> Result<()> {
        self.check()?;
        let cluster = self.cluster()?;
        let mut runs = Runs {
            requests: 0,
            workers: cluster.workers(),
            objective: self.objective(),
            routers: BTreeMap::new(),
        };
        let whole = self
            .trace
            .as_deref()
            .map(|path| formats::read(path, cluster.shape.block_tokens))
            .transpose()?;
        let mut header = true;
        for seed in self.seed..self.seed.saturating_add(self.seeds) {
            let mut trace = match &whole {
                Some(trace) => trace.clone(),
                None => self.synthetic(seed, cluster.shape.block_tokens)?,
            };
            trace.reshape(self.spread_ms, self.rate, seed);
            runs.requests = trace.requests.len();
            for name in &self.routers {
                let mut router = match self.own(name, &cluster, runs.requests, seed)? {
                    Some(router) => router,
                    None => {
                        others(name, &cluster, seed).ok_or_else(|| Error::invalid(unknown(name)))?
                    }
                };
                let title = format!("{name}, seed {seed}");
                let mut watch = watch(&title);
                let outcomes =
                    cluster.run_watched(&trace, router.as_mut(), seed, watch.as_mut())?;
                drop(watch);
                let figures = Figures::of(&cluster, &outcomes, &trace, runs.objective);
                if !self.json {
                    say(&figures.table(&title, header))?;
                    header = false;
                }
                runs.routers.entry(name.clone()).or_default().push(figures);
            }
        }
        if self.json {
            let text =
                serde_json::to_string(&runs).map_err(|error| Error::invalid(error.to_string()))?;
            say(&(text + "\n"))?;
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if !(self.rate > 0.0 && self.spread_ms >= 0.0 && self.event_lag_ms >= 0.0) {
            return Err(Error::invalid(
                "rate must be above 0, spread and lag not below",
            ));
        }
        if !((0.0..1.0).contains(&self.rate_error) && self.temperature >= 0.0) {
            return Err(Error::invalid(
                "rate error must be in 0..1, temperature not below 0",
            ));
        }
        if self.max_wait_ms.is_some_and(|ms| ms.is_nan() || ms < 0.0) {
            return Err(Error::invalid("the longest wait must not be below 0"));
        }
        Ok(())
    }

    fn objective(&self) -> Slo {
        Slo {
            ttft_ms: self.slo_ttft_ms,
            itl_ms: self.slo_itl_ms,
            e2e_ms: self.slo_e2e_ms,
        }
    }

    fn cluster(&self) -> Result<Cluster> {
        let rates = match &self.rates {
            Some(path) => Rates::read(path)?,
            None => Rates::default(),
        };
        let timing = rates.timing;
        let noise = if self.noise > 0.0 {
            self.noise
        } else {
            timing.noise
        };
        Ok(Cluster {
            aggregated: if self.prefill > 0 { 0 } else { self.workers },
            prefill: self.prefill,
            decode: self.decode,
            shape: Shape {
                blocks: self.blocks.unwrap_or(rates.shape.blocks),
                block_tokens: self.block_tokens.unwrap_or(rates.shape.block_tokens),
                pass_tokens: self.pass_tokens.unwrap_or(rates.shape.pass_tokens),
                max_running: self.max_running.unwrap_or(rates.shape.max_running),
            },
            timing: Timing { noise, ..timing },
            store: (self.host_blocks > 0).then_some(StoreShape {
                workers: self.node_workers as usize,
                host: self.host_blocks,
                nvme: self.nvme_blocks,
                network: self.network_blocks,
                policy: self.eviction,
            }),
            event_lag_ms: self.event_lag_ms,
            slowdowns: self.slow.clone(),
        })
    }

    fn synthetic(&self, seed: u64, block_tokens: u32) -> Result<Trace> {
        let positive = [self.per_second, self.turn_tokens, self.output_tokens];
        if self.requests == 0 || self.turns < 1.0 || positive.iter().any(|x| *x <= 0.0) {
            return Err(Error::invalid(
                "synthetic traffic needs requests, more than 0 a second, tokens, and at least one turn",
            ));
        }
        let shape = Synthetic {
            requests: self.requests,
            per_second: self.per_second,
            systems: self.systems,
            system_tokens: self.system_tokens,
            turn_tokens: self.turn_tokens,
            output_tokens: self.output_tokens,
            turns: self.turns,
            block_tokens,
        };
        shape.generate(seed)
    }

    fn admission(&self) -> Admission {
        let Some(max_held) = self.max_held else {
            return Admission::off();
        };
        let bounds = Admission::default();
        Admission {
            max_held,
            max_wait_ms: self.max_wait_ms.unwrap_or(bounds.max_wait_ms),
            ..bounds
        }
    }

    /// kvmesh's router, if it has the name.
    fn own(
        &self,
        name: &str,
        cluster: &Cluster,
        requests: usize,
        seed: u64,
    ) -> Result<Option<Box<dyn Router>>> {
        let (policy, joint) = match name {
            "kv-immediate" => (PolicyName::Kv, false),
            name => match name.parse() {
                Ok(policy) => (policy, true),
                Err(_) => return Ok(None),
            },
        };
        let config = Config {
            policy,
            joint,
            temperature: self.temperature,
            prices: self.prices.unwrap_or_default(),
            admission: self.admission(),
            ..Config::default()
        };
        Ok(Some(Box::new(Mesh::new(
            cluster,
            config,
            requests,
            self.rate_error,
            seed,
        )?)))
    }
}
