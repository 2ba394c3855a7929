//! What is simulated: engines and where they are, and what a run of them brings about.

use rustc_hash::FxHashSet;

use crate::{
    Error, Result, job::Shape, store::StoreShape, timeline::Timeline, timing::Timing, trace::Trace,
};

/// A cluster of alike engines.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Aggregated workers; 0 when split.
    pub aggregated: usize,
    /// Prefill workers, numbered from `aggregated` on.
    pub prefill: usize,
    /// Decode workers, numbered after the prefill workers.
    pub decode: usize,
    /// Every engine's sizes.
    pub shape: Shape,
    /// Every engine's speed.
    pub timing: Timing,
    /// Every node's store; None: engines have nothing below their devices.
    pub store: Option<StoreShape>,
    /// Milliseconds until the router hears of a cached or evicted block.
    pub event_lag_ms: f64,
    /// Changes of speed: (time ms, worker, factor on the duration of passes).
    pub slowdowns: Vec<(f64, usize, f64)>,
}

/// What a run brought about.
pub struct Outcomes {
    /// One of each request.
    pub timelines: Vec<Timeline>,
    /// Milliseconds each worker spent in passes.
    pub busy_ms: Vec<f64>,
    /// Milliseconds from the first arrival to the last token.
    pub span_ms: f64,
}

impl Cluster {
    /// Workers in all.
    pub fn workers(&self) -> usize {
        self.aggregated + self.prefill + self.decode
    }

    /// The node that a worker is on.
    pub fn node_of(&self, worker: usize) -> usize {
        worker / self.store.map_or(self.workers(), |store| store.workers)
    }

    /// Nodes with a store.
    pub fn stores(&self) -> usize {
        (self.store).map_or(0, |store| self.workers().div_ceil(store.workers))
    }

    /// Fails for a cluster that cannot serve, and a request that no worker can hold.
    pub(crate) fn check(&self, trace: &Trace) -> Result<()> {
        self.timing.check()?;
        let Shape {
            blocks,
            block_tokens,
            pass_tokens,
            max_running,
        } = self.shape;
        if blocks == 0 || block_tokens == 0 || pass_tokens == 0 || max_running == 0 {
            return Err(Error::invalid(format!("not an engine: {:?}", self.shape)));
        }
        if self.store.is_some_and(|store| store.workers == 0) {
            return Err(Error::invalid("a node without workers"));
        }
        if self.aggregated == 0 && (self.prefill == 0 || self.decode == 0) {
            return Err(Error::invalid(
                "no worker that could serve alone, and no pair",
            ));
        }
        if self
            .slowdowns
            .iter()
            .any(|&(_, worker, factor)| worker >= self.workers() || factor <= 0.0)
        {
            return Err(Error::invalid("a slowdown of no worker, or to no speed"));
        }
        let mut sessions = FxHashSet::default();
        for request in &trace.requests {
            let first = sessions.insert(request.session) || request.session == 0;
            if first && request.delay_ms.is_some() {
                return Err(Error::invalid(
                    "a request that comes after another of its session, which is not there",
                ));
            }
        }
        // One block is left so that a stream can always grow.
        let capacity = u64::from(blocks - 1) * u64::from(block_tokens);
        let fits = |prompt: u32, output: u32| u64::from(prompt) + u64::from(output) <= capacity;
        match trace.requests.iter().find(|r| !fits(r.prompt, r.output)) {
            Some(r) => Err(Error::invalid(format!(
                "a request of {} + {} tokens does not fit a worker's {capacity}",
                r.prompt, r.output
            ))),
            None => Ok(()),
        }
    }
}
