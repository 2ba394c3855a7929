//! Percentiles of what happened, as a table or JSON.

use serde::Serialize;

use crate::{
    cluster::{Cluster, Outcomes},
    timeline::Timeline,
    trace::Trace,
};

/// Milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq)]
pub struct Spread {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Spread {
    /// Of these values; zeros when there are none. Percentiles by nearest rank.
    pub fn of(mut values: Vec<f64>) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let rank = |p: f64| values[((values.len() as f64 * p).ceil() as usize).max(1) - 1];
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: rank(0.50),
            p95: rank(0.95),
            p99: rank(0.99),
        }
    }
}

/// What a request must keep to be a good one, in milliseconds; None: anything will do.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq)]
pub struct Slo {
    /// To the first token.
    pub ttft_ms: Option<f64>,
    /// Between tokens, mean of the request.
    pub itl_ms: Option<f64>,
    /// To the last token.
    pub e2e_ms: Option<f64>,
}

impl Slo {
    /// Whether a request that was served kept all of it.
    pub fn kept(&self, life: &Timeline) -> bool {
        let within = |value: f64, bound: Option<f64>| bound.is_none_or(|bound| value <= bound);
        within(life.ttft(), self.ttft_ms)
            && within(life.itl().unwrap_or(0.0), self.itl_ms)
            && within(life.ended - life.arrived, self.e2e_ms)
    }
}

/// The figures of one run.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Figures {
    /// Requests served; what follows is about these.
    pub requests: usize,
    /// Requests refused.
    pub refused: usize,
    /// Milliseconds to the first token.
    pub ttft_ms: Spread,
    /// Milliseconds between tokens, mean of each request.
    pub itl_ms: Spread,
    /// Milliseconds to the last token.
    pub e2e_ms: Spread,
    /// Share of all prompt tokens that were found cached.
    pub reuse: f64,
    /// Share of all prompt tokens that were brought up from below the device; part of `reuse`.
    pub onboarded: f64,
    /// Share of time the workers spent in passes, mean.
    pub utilisation: f64,
    /// The busiest worker's.
    pub utilisation_max: f64,
    /// Each worker's.
    pub utilisations: Vec<f64>,
    /// Output tokens a second.
    pub output_per_s: f64,
    /// Requests a second that kept the objective.
    pub goodput_per_s: f64,
    /// Their share of all requests, refused ones included.
    pub good: f64,
    /// Seconds from the first arrival to the last token.
    pub span_s: f64,
}

impl Figures {
    /// Sums up a run of `trace`.
    pub fn of(cluster: &Cluster, outcomes: &Outcomes, trace: &Trace, slo: Slo) -> Self {
        let span_ms = outcomes.span_ms.max(f64::MIN_POSITIVE);
        let used: Vec<f64> = outcomes.busy_ms.iter().map(|busy| busy / span_ms).collect();
        let all = outcomes.timelines.iter().zip(&trace.requests);
        let served = || all.clone().filter(|(life, _)| !life.refused);
        let lives = || served().map(|(life, _)| life);
        let prompts: u64 = served().map(|(_, wanted)| u64::from(wanted.prompt)).sum();
        let cached: u64 = lives().map(|life| u64::from(life.cached)).sum();
        let onboarded: u64 = lives().map(|life| u64::from(life.onboarded)).sum();
        let output: u64 = lives().map(|life| u64::from(life.output)).sum();
        let good = lives().filter(|life| slo.kept(life)).count() as f64;
        let requests = lives().count();
        Self {
            requests,
            refused: outcomes.timelines.len() - requests,
            ttft_ms: Spread::of(lives().map(Timeline::ttft).collect()),
            itl_ms: Spread::of(lives().filter_map(Timeline::itl).collect()),
            e2e_ms: Spread::of(lives().map(|life| life.ended - life.arrived).collect()),
            reuse: cached as f64 / prompts.max(1) as f64,
            onboarded: onboarded as f64 / prompts.max(1) as f64,
            utilisation: used.iter().sum::<f64>() / cluster.workers() as f64,
            utilisation_max: used.iter().copied().fold(0.0, f64::max),
            utilisations: used,
            output_per_s: output as f64 / span_ms * 1e3,
            goodput_per_s: good / span_ms * 1e3,
            good: good / outcomes.timelines.len().max(1) as f64,
            span_s: outcomes.span_ms / 1e3,
        }
    }

    /// Lines of a table, its header first when asked.
    pub fn table(&self, name: &str, header: bool) -> String {
        let mut text = String::new();
        if header {
            text += &format!(
                "{:<24} {:>28}  {:>17}  {:>17}\n",
                "milliseconds", "TTFT", "ITL", "E2E"
            );
            text += &format!(
                "{:<24} {:>8} {:>6} {:>6} {:>6} {:>6} {:>5} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:>5} {:>8} {:>6} {:>7}\n",
                "",
                "mean",
                "p50",
                "p95",
                "p99",
                "mean",
                "p95",
                "p99",
                "mean",
                "p95",
                "p99",
                "reuse",
                "onboard",
                "util",
                "good/s",
                "good",
                "refused"
            );
        }
        let Self {
            ttft_ms,
            itl_ms,
            e2e_ms,
            ..
        } = self;
        text += &format!(
            "{name:<24} {:>8.1} {:>6.0} {:>6.0} {:>6.0} {:>6.1} {:>5.0} {:>6.0} {:>6.0} {:>6.0} {:>6.0} {:>6.3} {:>7.3} {:>5.2} {:>8.2} {:>6.3} {:>7}\n",
            ttft_ms.mean,
            ttft_ms.p50,
            ttft_ms.p95,
            ttft_ms.p99,
            itl_ms.mean,
            itl_ms.p95,
            itl_ms.p99,
            e2e_ms.mean,
            e2e_ms.p95,
            e2e_ms.p99,
            self.reuse,
            self.onboarded,
            self.utilisation,
            self.goodput_per_s,
            self.good,
            self.refused,
        );
        text
    }
}
