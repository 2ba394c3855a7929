//! The timing model fitted to measurements: the coefficients with which the simulator gives what was measured.
//!
//! Queueing, batching and chunking are part of what was measured, so requests are not regressed one by one; the whole
//! workload is simulated with each set of coefficients tried, and [`search`] looks for the set that comes closest, in the
//! logarithm, to the times to the first token and between tokens. Some requests are held out: they are simulated with the
//! others, as they were there, but the search does not see how long they took.

mod measured;
mod search;

pub use measured::Measured;

use std::path::PathBuf;

use clap::Args as Arguments;
use rand::seq::SliceRandom;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::Serialize;

use crate::{
    Error, Result,
    cli::at_least_one,
    cluster::Cluster,
    job::Shape,
    rates::Rates,
    router::{Placement, Router},
    say,
    timeline::Timeline,
    timing::Timing,
    trace::Request,
    watch::Watch,
};

/// Relative errors beyond this weigh no more than in proportion (Huber, 1964).
const TRUST: f64 = 0.3;
/// Weight of the error of a mean beside those of single requests.
const MEANS: f64 = 4.0;

/// Fits the timing model to measured requests: their prompts, arrivals, times to the first token and between tokens.
#[derive(Clone, Debug, Arguments)]
pub struct Args {
    /// Measured requests (.jsonl): LLMServingSim's `requests.jsonl`, whose `meta.json` is read too if it is there;
    /// aiperf's `profile_export.jsonl`; or lines with arrival_ms, prompt_tokens, cached_tokens, output_tokens, ttft_ms,
    /// and itl_ms (the mean, or all).
    pub file: PathBuf,
    /// The workload that LLMServingSim measured, for the prefixes that its prompts share.
    #[arg(long, value_name = "FILE")]
    pub workload: Option<PathBuf>,
    /// Where to write the rates, for `simulate --rates`.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Share of the requests held out.
    #[arg(long, value_name = "X", default_value_t = 0.25)]
    pub hold_out: f64,
    /// Chooses those.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Sets of coefficients to try.
    #[arg(long, value_name = "N", default_value_t = 1_200)]
    pub tries: usize,
    /// Engines that served the requests [default: 1, or as `meta.json` says].
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// Blocks in an engine's pool [default: as `meta.json` says, or enough].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub blocks: Option<u32>,
    /// Tokens in a block [default: 16, or as `meta.json` says].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub block_tokens: Option<u32>,
    /// Tokens in a pass [default: 8192, or as `meta.json` says].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub pass_tokens: Option<u32>,
    /// Requests an engine runs at once [default: 256, or as `meta.json` says].
    #[arg(long, value_name = "N")]
    pub max_running: Option<usize>,
    /// Print one JSON object in place of a table.
    #[arg(long)]
    pub json: bool,
}

/// Measured against simulated, of some requests.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq)]
pub struct Comparison {
    /// Mean milliseconds measured.
    pub measured_ms: f64,
    /// Mean milliseconds simulated.
    pub simulated_ms: f64,
    /// The difference of the means over the measured one.
    pub error: f64,
    /// The mean of single requests' absolute differences over the measured ones.
    pub single_error: f64,
}

/// What the fit is worth.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Quality {
    /// Requests compared.
    pub requests: usize,
    /// To the first token.
    pub ttft: Comparison,
    /// Between tokens.
    pub itl: Comparison,
}

/// A fit.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Fitted {
    /// The model, and the engines' sizes it holds for.
    pub rates: Rates,
    /// On requests that it was fitted to.
    pub fitted: Quality,
    /// On requests that it has not seen.
    pub held_out: Quality,
}

/// One pair of times, measured and simulated, of each request that has both.
type Pairs = Vec<(f64, f64)>;

impl Args {
    /// Fits, prints what came of it, and writes the rates.
    pub fn run(&self, watch: &mut dyn Watch) -> Result<()> {
        if !(0.0..1.0).contains(&self.hold_out) {
            return Err(Error::invalid("the share held out must be in 0..1"));
        }
        let (measured, engine) = Measured::read(&self.file, self.workload.as_deref(), self)?;
        let fitted = fit(
            &measured,
            engine,
            self.hold_out,
            self.seed,
            self.tries,
            watch,
        )?;
        if self.json {
            let text = serde_json::to_string(&fitted)
                .map_err(|error| Error::invalid(error.to_string()))?;
            say(&(text + "\n"))?;
        } else {
            say(&table(&fitted))?;
        }
        self.out
            .as_deref()
            .map_or(Ok(()), |path| fitted.rates.write(path))
    }
}

/// Fits the timing model of engines to what they were measured to take.
///
/// Fails when there are too few requests to hold any out, and when they do not fit the engines.
pub fn fit(
    measured: &Measured,
    engine: Cluster,
    hold_out: f64,
    seed: u64,
    tries: usize,
    watch: &mut dyn Watch,
) -> Result<Fitted> {
    let count = measured.trace.requests.len();
    let held_out = (count as f64 * hold_out).round() as usize;
    if count < held_out + 4 {
        return Err(Error::invalid(format!(
            "{count} requests are too few to fit to"
        )));
    }
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let (unseen, seen) = order.split_at(held_out);
    let simulate = |timing: Timing| -> Result<Vec<Timeline>> {
        let cluster = Cluster {
            timing,
            ..engine.clone()
        };
        let mut router = FewestLive::new(engine.aggregated);
        Ok(cluster.run(&measured.trace, &mut router, 0)?.timelines)
    };
    let start = first_guess(measured);
    simulate(timing(&start))?;
    let mut tried = 0;
    let best = search::nelder_mead(&start, 0.5, tries, |point| {
        tried += 1;
        if !watch.goes_on(tried.min(tries), tries) {
            return None;
        }
        let lives = simulate(timing(point)).ok()?;
        Some(loss(&measured.ttft(&lives, seen)) + loss(&measured.itl(&lives, seen)))
    })
    .ok_or(Error::Interrupted)?;
    let lives = simulate(timing(&best))?;
    let quality = |which: &[usize]| Quality {
        requests: which.len(),
        ttft: compare(&measured.ttft(&lives, which)),
        itl: compare(&measured.itl(&lives, which)),
    };
    Ok(Fitted {
        rates: Rates {
            timing: timing(&best),
            shape: engine.shape,
        },
        fitted: quality(seen),
        held_out: quality(unseen),
    })
}

/// The model with these logarithms of coefficients: a pass with a prompt, a token, a token squared, a pass with streams, a
/// full pool, a stream.
fn timing(point: &[f64]) -> Timing {
    let [pass, token, square, step, full, stream] = std::array::from_fn(|at| point[at].exp());
    Timing {
        prefill: [pass, token, square],
        decode: [step, full, 0.0],
        stream,
        ..Timing::default()
    }
}

/// From the fastest requests, which waited least.
fn first_guess(measured: &Measured) -> Vec<f64> {
    let low = |mut values: Vec<f64>, otherwise: f64| {
        values.sort_by(f64::total_cmp);
        values
            .get(values.len() / 10)
            .copied()
            .unwrap_or(otherwise)
            .max(1e-6)
    };
    let requests = measured.trace.requests.iter();
    let per_token = requests
        .zip(&measured.ttft_ms)
        .map(|(request, ms)| ms / f64::from(request.prompt));
    let token = low(per_token.collect(), 0.1);
    let step = low(measured.itl_ms.iter().flatten().copied().collect(), 10.0);
    let guess = [
        step,
        0.5 * token,
        1e-4 * token,
        0.8 * step,
        0.5 * step,
        0.005 * step,
    ];
    guess.map(f64::ln).to_vec()
}

fn loss(pairs: &Pairs) -> f64 {
    if pairs.is_empty() {
        return 0.0;
    }
    let huber = |error: f64| match error.abs() {
        size if size <= TRUST => 0.5 * size * size,
        size => TRUST * (size - 0.5 * TRUST),
    };
    let ratio = |(measured, simulated): (f64, f64)| (simulated / measured).ln();
    let single = pairs.iter().map(|&pair| huber(ratio(pair))).sum::<f64>();
    single / pairs.len() as f64 + MEANS * huber(ratio(means(pairs)))
}

fn means(pairs: &Pairs) -> (f64, f64) {
    let count = pairs.len().max(1) as f64;
    let sum = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>();
    (sum(|pair| pair.0) / count, sum(|pair| pair.1) / count)
}

fn compare(pairs: &Pairs) -> Comparison {
    if pairs.is_empty() {
        return Comparison::default();
    }
    let (measured_ms, simulated_ms) = means(pairs);
    let singles = pairs
        .iter()
        .map(|(measured, simulated)| (simulated / measured - 1.0).abs());
    Comparison {
        measured_ms,
        simulated_ms,
        error: simulated_ms / measured_ms - 1.0,
        single_error: singles.sum::<f64>() / pairs.len() as f64,
    }
}

fn table(fitted: &Fitted) -> String {
    let Timing {
        prefill,
        decode,
        stream,
        ..
    } = fitted.rates.timing;
    let Shape {
        blocks,
        block_tokens,
        pass_tokens,
        max_running,
    } = fitted.rates.shape;
    let mut text = format!(
        "pass with prompts: {:.3} ms + {:.6} n + {:.3e} n^2 for n tokens\n\
         pass with streams: {:.3} ms + {:.3} p + {:.5} s for a share p of the pool in use and s streams\n\
         engine: {blocks} blocks of {block_tokens} tokens, {pass_tokens} tokens a pass, {max_running} at once\n\n\
         {:<22} {:>8} {:>12} {:>12} {:>8} {:>8}\n",
        prefill[0],
        prefill[1],
        prefill[2],
        decode[0],
        decode[1],
        stream,
        "ms",
        "requests",
        "measured",
        "simulated",
        "error",
        "single",
    );
    for (name, quality) in [("fitted", &fitted.fitted), ("held out", &fitted.held_out)] {
        for (what, of) in [("TTFT", quality.ttft), ("ITL", quality.itl)] {
            text += &format!(
                "{:<22} {:>8} {:>12.1} {:>12.1} {:>+7.1}% {:>7.1}%\n",
                format!("{what} mean, {name}"),
                quality.requests,
                of.measured_ms,
                of.simulated_ms,
                100.0 * of.error,
                100.0 * of.single_error,
            );
        }
    }
    text
}

/// Engines that share a load among themselves: each request to the one with the fewest.
struct FewestLive {
    live: Vec<usize>,
    places: Vec<usize>,
}

impl FewestLive {
    fn new(workers: usize) -> Self {
        Self {
            live: vec![0; workers],
            places: Vec::new(),
        }
    }
}

impl Router for FewestLive {
    fn arrived(&mut self, _: f64, id: usize, _: &Request, placements: &mut Vec<Placement>) {
        let fewest = (0..self.live.len()).min_by_key(|&worker| self.live[worker]);
        let worker = fewest.unwrap_or_default();
        self.live[worker] += 1;
        self.places.resize(self.places.len().max(id + 1), 0);
        self.places[id] = worker;
        placements.push(Placement {
            request: id,
            prefill: worker,
            decode: worker,
        });
    }

    fn prefilled(&mut self, _: f64, _: usize, _: &mut Vec<Placement>) {}

    fn finished(&mut self, _: f64, id: usize, _: u32, _: &mut Vec<Placement>) {
        self.live[self.places[id]] -= 1;
    }

    fn stored(&mut self, _: f64, _: usize, _: &std::rc::Rc<[u64]>, _: usize, _: usize) {}

    fn removed(&mut self, _: f64, _: usize, _: &[u64]) {}
}
