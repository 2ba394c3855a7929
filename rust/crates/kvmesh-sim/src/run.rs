//! The event loop: a trace, a router and engines, until the last token.

use std::collections::{BinaryHeap, VecDeque};

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{
    Error, Result,
    cluster::{Cluster, Outcomes},
    engine::Engine,
    event::{Event, Happening},
    job::{Job, Outcome},
    router::{Placement, Router},
    store::{Below, Store},
    timeline::Timeline,
    trace::Trace,
    watch::{Unwatched, Watch},
};

/// Events between two looks of whoever watches.
const LOOK: u64 = 1 << 14;

/// Where a split request's halves are.
#[derive(Clone, Copy, Default)]
struct Split {
    prefill: usize,
    prefill_slot: usize,
    decode: usize,
    decode_slot: usize,
}

struct Run<'a> {
    cluster: &'a Cluster,
    trace: &'a Trace,
    router: &'a mut dyn Router,
    engines: Vec<Engine>,
    /// By node; the network's after those of the nodes.
    stores: Vec<Store>,
    versions: Vec<u64>,
    events: BinaryHeap<Event>,
    numbered: u64,
    wake: (u64, f64),
    splits: Vec<Split>,
    /// Computed prompts for which a decode worker has no room yet.
    receivable: Vec<VecDeque<usize>>,
    timelines: Vec<Timeline>,
    placements: Vec<Placement>,
    outcomes: Vec<Outcome>,
    random: ChaCha8Rng,
    /// Of a request, the one of its session that comes after it ended.
    followers: FxHashMap<usize, usize>,
    refused: Vec<usize>,
    finished: usize,
    last_ms: f64,
}

impl Cluster {
    /// Runs a trace to its end. The same inputs and seed give the same outcome.
    ///
    /// Fails for a cluster that cannot serve, a request that no worker can hold, and a router that leaves
    /// requests unplaced or places them where they cannot run.
    pub fn run(&self, trace: &Trace, router: &mut dyn Router, seed: u64) -> Result<Outcomes> {
        self.run_watched(trace, router, seed, &mut Unwatched)
    }

    /// The same, watched; fails with [`Error::Interrupted`] when the watch ends it.
    pub fn run_watched(
        &self,
        trace: &Trace,
        router: &mut dyn Router,
        seed: u64,
        watch: &mut dyn Watch,
    ) -> Result<Outcomes> {
        self.check(trace)?;
        let count = trace.requests.len();
        let mut run = Run {
            cluster: self,
            trace,
            router,
            engines: (0..self.workers())
                .map(|_| Engine::new(self.shape, self.timing))
                .collect(),
            stores: (self.store.iter())
                .flat_map(|shape| {
                    let nodes = (0..self.stores()).map(|_| Store::of_node(shape));
                    nodes.chain((shape.network > 0).then(|| Store::of_network(shape)))
                })
                .collect(),
            versions: vec![0; self.workers()],
            events: BinaryHeap::new(),
            numbered: 0,
            wake: (0, f64::INFINITY),
            splits: vec![Split::default(); if self.prefill > 0 { count } else { 0 }],
            receivable: vec![VecDeque::new(); self.workers()],
            timelines: vec![Timeline::default(); count],
            placements: Vec::new(),
            outcomes: Vec::new(),
            random: ChaCha8Rng::seed_from_u64(seed ^ 0x0e79_10e5),
            followers: followers(trace),
            refused: Vec::new(),
            finished: 0,
            last_ms: 0.0,
        };
        for &(at, worker, factor) in &self.slowdowns {
            run.schedule(at, Happening::Slowdown { worker, factor });
        }
        run.all(watch)?;
        let first = trace.requests.first().map_or(0.0, |r| r.arrival_ms);
        Ok(Outcomes {
            busy_ms: run.engines.iter().map(Engine::busy_ms).collect(),
            span_ms: run.last_ms - first,
            timelines: run.timelines,
        })
    }
}

/// By request, the next one of its session where that waits for its end.
fn followers(trace: &Trace) -> FxHashMap<usize, usize> {
    let mut last: FxHashMap<u64, usize> = FxHashMap::default();
    let mut followers = FxHashMap::default();
    for (at, request) in trace
        .requests
        .iter()
        .enumerate()
        .filter(|(_, r)| r.session != 0)
    {
        let before = last.insert(request.session, at);
        if let (Some(before), Some(_)) = (before, request.delay_ms) {
            followers.insert(before, at);
        }
    }
    followers
}

impl Run<'_> {
    fn all(&mut self, watch: &mut dyn Watch) -> Result<()> {
        let count = self.trace.requests.len();
        let (mut arrivals, mut turns) = (0, 0);
        loop {
            turns += 1;
            if turns % LOOK == 0 && !watch.goes_on(self.finished, count) {
                return Err(Error::Interrupted);
            }
            let later = |at: &usize| self.trace.requests[*at].delay_ms.is_some();
            while arrivals < count && later(&arrivals) {
                arrivals += 1;
            }
            let arrival = self.trace.requests.get(arrivals).map(|r| r.arrival_ms);
            let event = self.events.peek().map(|event| event.at);
            let now = match (arrival, event) {
                (Some(arrival), Some(event)) if event < arrival => event,
                (Some(arrival), _) => {
                    self.arrive(arrival, arrivals);
                    arrivals += 1;
                    self.follow(arrival)?;
                    continue;
                }
                (None, Some(event)) => event,
                (None, None) => break,
            };
            if let Some(event) = self.events.pop() {
                self.happen(now, event.what)?;
            }
            if self.finished == count {
                break;
            }
        }
        if self.finished < count {
            let left = count - self.finished;
            return Err(Error::invalid(format!("{left} requests never ended")));
        }
        watch.goes_on(count, count);
        Ok(())
    }

    fn arrive(&mut self, now: f64, request: usize) {
        self.timelines[request].arrived = now;
        let wanted = &self.trace.requests[request];
        self.router
            .arrived(now, request, wanted, &mut self.placements);
    }

    /// A request has ended, in one way or the other.
    fn ended(&mut self, now: f64, request: usize) {
        self.finished += 1;
        self.last_ms = now;
        if let Some(&next) = self.followers.get(&request) {
            let delay = self.trace.requests[next].delay_ms.unwrap_or(0.0);
            self.schedule(now + delay, Happening::Arrival { request: next });
        }
    }

    fn happen(&mut self, now: f64, what: Happening) -> Result<()> {
        match what {
            Happening::Arrival { request } => self.arrive(now, request),
            Happening::Pass { worker, version } if self.versions[worker] == version => {
                self.engines[worker].finish(&mut self.outcomes);
                self.settle(now, worker)?;
                self.receive(now, worker)?;
                self.kick(now, worker)?;
            }
            Happening::Transferred { request } => {
                let Split {
                    prefill,
                    prefill_slot,
                    decode,
                    decode_slot,
                } = self.splits[request];
                self.engines[prefill].release(prefill_slot);
                self.kick(now, prefill)?;
                self.timelines[request].first = now;
                self.router.transferred(now, request, &mut self.placements);
                self.cut_short(now, decode);
                self.engines[decode].join(decode_slot);
                self.engines[decode].take_outcomes(&mut self.outcomes);
                self.settle(now, decode)?;
                // A single token needs no pass: its blocks are free already.
                self.receive(now, decode)?;
                self.kick(now, decode)?;
            }
            Happening::Stored {
                worker,
                chain,
                from,
                to,
            } => {
                self.router.stored(now, worker, &chain, from, to);
            }
            Happening::Removed { worker, hashes } => self.router.removed(now, worker, &hashes),
            Happening::Kept { node, change } => self.router.kept(now, node, &change),
            Happening::Slowdown { worker, factor } => self.engines[worker].slowdown = factor,
            Happening::Wake { version } if version == self.wake.0 => {
                self.wake.1 = f64::INFINITY;
                self.router.wake(now, &mut self.placements);
            }
            Happening::Pass { .. } | Happening::Wake { .. } => return Ok(()),
        }
        self.follow(now)
    }

    /// Carries out what an engine's pass brought about.
    fn settle(&mut self, now: f64, worker: usize) -> Result<()> {
        let mut outcomes = std::mem::take(&mut self.outcomes);
        for outcome in outcomes.drain(..) {
            match outcome {
                Outcome::Admitted {
                    request,
                    cached,
                    onboarded,
                } => {
                    self.timelines[request].cached = cached;
                    self.timelines[request].onboarded = onboarded;
                }
                Outcome::Prefilled { request, slot } => {
                    self.keep(now, worker, request);
                    if self.split_of(request, worker) {
                        self.splits[request].prefill_slot = slot;
                        let decode = self.splits[request].decode;
                        self.receivable[decode].push_back(request);
                        self.router.prefilled(now, request, &mut self.placements);
                        self.receive(now, decode)?;
                    } else {
                        self.timelines[request].first = now;
                        self.router.prefilled(now, request, &mut self.placements);
                    }
                }
                Outcome::Finished { request } => {
                    let output = self.trace.requests[request].output;
                    self.timelines[request].finish(now, output);
                    self.ended(now, request);
                    self.router
                        .finished(now, request, output, &mut self.placements);
                }
                Outcome::Stored { chain, from, to } => {
                    if self.cluster.event_lag_ms > 0.0 {
                        let what = Happening::Stored {
                            worker,
                            chain,
                            from,
                            to,
                        };
                        self.schedule(now + self.cluster.event_lag_ms, what);
                    } else {
                        self.router.stored(now, worker, &chain, from, to);
                    }
                }
                Outcome::Removed(hashes) => {
                    if self.cluster.event_lag_ms > 0.0 {
                        let what = Happening::Removed { worker, hashes };
                        self.schedule(now + self.cluster.event_lag_ms, what);
                    } else {
                        self.router.removed(now, worker, &hashes);
                    }
                }
            }
        }
        self.outcomes = outcomes;
        Ok(())
    }

    /// A computed prompt goes to the store of its node, and to that of the network.
    fn keep(&mut self, now: f64, worker: usize, request: usize) {
        let lag = self.cluster.event_lag_ms;
        for node in [self.cluster.node_of(worker), self.cluster.stores()] {
            let Some(store) = self.stores.get_mut(node) else {
                continue;
            };
            for change in store.touch(now, &self.trace.requests[request].chain) {
                if lag > 0.0 {
                    self.schedule(now + lag, Happening::Kept { node, change });
                } else {
                    self.router.kept(now, node, &change);
                }
            }
        }
    }

    fn split_of(&self, request: usize, worker: usize) -> bool {
        worker >= self.cluster.aggregated && !self.splits.is_empty() && {
            let split = self.splits[request];
            split.prefill == worker && split.decode != worker
        }
    }

    /// Starts transfers of computed prompts to a decode worker, as far as they fit.
    fn receive(&mut self, now: f64, decode: usize) -> Result<()> {
        while let Some(&request) = self.receivable[decode].front() {
            let job = self.job(request, false);
            let Some(slot) = self.engines[decode].reserve(&job) else {
                break;
            };
            self.receivable[decode].pop_front();
            self.splits[request].decode_slot = slot;
            let ms = self.cluster.timing.transfer_ms(job.prompt);
            self.schedule(now + ms, Happening::Transferred { request });
        }
        Ok(())
    }

    /// Carries out the router's placements, and notes when it wants to be woken.
    fn follow(&mut self, now: f64) -> Result<()> {
        let mut placements = std::mem::take(&mut self.placements);
        for placement in placements.drain(..) {
            let Placement {
                request,
                prefill,
                decode,
            } = placement;
            let (aggregated, split) = (self.cluster.aggregated, prefill != decode);
            let decodes = aggregated + self.cluster.prefill..self.cluster.workers();
            let possible = if split {
                (aggregated..decodes.start).contains(&prefill) && decodes.contains(&decode)
            } else {
                prefill < aggregated
            };
            if !possible || self.timelines[request].placed.is_some() {
                return Err(Error::invalid(format!(
                    "the router cannot place so: {placement:?}"
                )));
            }
            self.timelines[request].placed = Some(prefill);
            self.timelines[request].decoded = Some(decode);
            if split {
                self.splits[request] = Split {
                    prefill,
                    decode,
                    ..Split::default()
                };
            }
            let job = self.job(request, split);
            self.engines[prefill].submit(job);
            self.cut_short(now, prefill);
            self.kick(now, prefill)?;
        }
        self.placements = placements;
        self.router.take_refused(&mut self.refused);
        for request in std::mem::take(&mut self.refused) {
            self.timelines[request].refused = true;
            self.ended(now, request);
        }
        if let Some(at) = self.router.wakes_at(now) {
            if at < self.wake.1 || self.wake.1 <= now {
                self.wake = (self.wake.0 + 1, at.max(now));
                let version = self.wake.0;
                self.schedule(at.max(now), Happening::Wake { version });
            }
        }
        Ok(())
    }

    fn job(&self, request: usize, prefill_only: bool) -> Job {
        let wanted = &self.trace.requests[request];
        Job {
            request,
            prompt: wanted.prompt,
            output: wanted.output,
            chain: wanted.chain.clone(),
            prefill_only,
        }
    }

    fn cut_short(&mut self, now: f64, worker: usize) {
        if let Some(end) = self.engines[worker].interrupt(now) {
            self.schedule_pass(end, worker);
        }
    }

    fn kick(&mut self, now: f64, worker: usize) -> Result<()> {
        if !self.engines[worker].busy() {
            let jitter = if self.cluster.timing.noise > 0.0 {
                self.random.random_range(-1.0..1.0)
            } else {
                0.0
            };
            let stores = [self.cluster.node_of(worker), self.cluster.stores()];
            let below = Below(stores.map(|node| self.stores.get(node)));
            if let Some(end) = self.engines[worker].start(now, jitter, below) {
                self.schedule_pass(end, worker);
            }
        }
        Ok(())
    }

    fn schedule_pass(&mut self, at: f64, worker: usize) {
        self.versions[worker] += 1;
        let version = self.versions[worker];
        self.schedule(at, Happening::Pass { worker, version });
    }

    fn schedule(&mut self, at: f64, what: Happening) {
        self.numbered += 1;
        self.events.push(Event {
            at,
            number: self.numbered,
            what,
        });
    }
}
