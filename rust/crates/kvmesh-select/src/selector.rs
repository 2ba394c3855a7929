//! The selector: workers, leases, speculation, rates and policies put together. The service's way in.

use rand::{Rng, RngCore};
use rustc_hash::FxHashMap;

use crate::{
    admission::{Admission, Refused},
    candidates::Scratch,
    choose::choose,
    cost::{Prices, Seat},
    drain::Drain,
    eviction::Returns,
    held::{Held, Waitlist},
    line::Line,
    policy::{Policy, PolicyName},
    queue::Waiting,
    rates::{ClassRates, Law, Work},
    reports::Errors,
    shadow::Shadow,
    slots::{Leases, Progress, Slots},
    speculation::Speculation,
    tail::Tail,
    types::{Candidate, Lookup, Placed, Request, WorkerId, WorkerSpec},
    worker::Worker,
};

/// What a selector can be told to do differently.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// Tokens in a block.
    pub block_tokens: u32,
    /// The policy of requests that name none.
    pub policy: PolicyName,
    /// Softens the choice; 0: the lowest cost wins.
    pub temperature: f64,
    /// Whether `kv` holds requests back while workers are busy, and places them as a plan. Not with a temperature.
    pub joint: bool,
    /// Milliseconds that a joint plan waits for others after the first request, so that a burst is planned as one.
    pub gather_ms: f64,
    /// Whether placements carry all candidates.
    pub explain: bool,
    /// A lease of which nothing is heard for so many milliseconds is reclaimed.
    pub lease_ttl_ms: f64,
    /// What cost is worth to others.
    pub prices: Prices,
    /// When requests wait, and for how long.
    pub admission: Admission,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            block_tokens: 64,
            policy: PolicyName::Kv,
            temperature: 0.0,
            joint: true,
            gather_ms: 0.2,
            explain: false,
            lease_ttl_ms: 30_000.0,
            prices: Prices::default(),
            admission: Admission::default(),
        }
    }
}

/// No worker can take a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "no worker can take this request: no aggregated one is left, and no pair of prefill and decode"
)]
pub struct NoWorker;

/// What a call may look up, draw from and fill.
pub struct Context<'a> {
    /// Milliseconds from 0 on, never falling from call to call.
    pub now: f64,
    /// Where cached prefixes are.
    pub lookup: &'a mut dyn Lookup,
    /// The only source of chance.
    pub chance: &'a mut dyn RngCore,
    /// Placements made by this call are added here.
    pub placed: &'a mut Vec<Placed>,
    /// Requests that this call refused are added here.
    pub refused: &'a mut Vec<Refused>,
}

/// Places requests on the workers of one model.
///
/// Owned by one thread; no call blocks. The same calls with the same times, look-ups and chances bring about the
/// same placements, bit for bit. After any call, what it placed is in [`Context::placed`] and
/// [`Selector::wakes_at`] says when [`Selector::tick`] is due.
pub struct Selector {
    pub(crate) config: Config,
    pub(crate) workers: Vec<Option<Worker>>,
    pub(crate) lives: u32,
    pub(crate) classes: FxHashMap<String, usize>,
    pub(crate) rates: Vec<ClassRates>,
    pub(crate) leases: Leases,
    pub(crate) speculation: Speculation,
    pub(crate) returns: Returns,
    /// By name, and whether it chooses decode partners.
    pub(crate) policies: FxHashMap<(PolicyName, bool), Box<dyn Policy>>,
    pub(crate) waitlist: Waitlist,
    pub(crate) line: Line,
    pub(crate) drain: Drain,
    /// Until when a plan waits for more requests.
    pub(crate) gathering: Option<f64>,
    /// Of a live stream: when it began, and what its worker had spent on prompts by then.
    pub(crate) streams: FxHashMap<u64, (f64, f64)>,
    pub(crate) tail: Tail,
    pub(crate) scratch: Scratch,
    pub(crate) errors: Errors,
    pub(crate) shadows: Vec<Shadow>,
}

impl Selector {
    /// Without workers yet.
    pub fn new(config: Config) -> Self {
        Self {
            leases: Leases::new(config.lease_ttl_ms, config.block_tokens),
            config,
            workers: Vec::new(),
            lives: 0,
            classes: FxHashMap::default(),
            rates: Vec::new(),
            speculation: Speculation::default(),
            returns: Returns::default(),
            policies: FxHashMap::default(),
            waitlist: Waitlist::default(),
            line: Line::default(),
            drain: Drain::default(),
            gathering: None,
            streams: FxHashMap::default(),
            tail: Tail::default(),
            scratch: Scratch::default(),
            errors: Errors::default(),
            shadows: Vec::new(),
        }
    }

    /// What it was told to do.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Changes the policy of requests that come from now on and name none.
    pub fn set_policy(&mut self, policy: PolicyName) {
        self.config.policy = policy;
    }

    /// Changes how soft choices are from now on.
    pub fn set_temperature(&mut self, temperature: f64) {
        self.config.temperature = temperature;
    }

    /// Adds a policy under [`PolicyName::External`]: what judges placements, and what judges decode partners.
    pub fn add_policy(&mut self, number: u16, judge: Box<dyn Policy>, partners: Box<dyn Policy>) {
        let name = PolicyName::External(number);
        self.policies.insert((name, false), judge);
        self.policies.insert((name, true), partners);
    }

    // -- workers --

    /// Adds a worker.
    pub fn add_worker(&mut self, spec: &WorkerSpec) -> WorkerId {
        let vacant = self.workers.iter().position(Option::is_none);
        let index = vacant.unwrap_or(self.workers.len());
        let id = WorkerId {
            index: index as u32,
            life: self.lives,
        };
        self.lives += 1;
        let next = self.rates.len();
        let class = *self.classes.entry(spec.class.clone()).or_insert(next);
        if class == next {
            self.rates.push(ClassRates::default());
        }
        self.rates[class].probe(&spec.probe, spec.pass_tokens.max(1));
        let worker = Worker::new(id, class, spec);
        match vacant {
            Some(_) => self.workers[index] = Some(worker),
            None => self.workers.push(Some(worker)),
        }
        self.leases.admit(id);
        id
    }

    /// Forgets a worker. Leases on it live on, without weight; what is held is placed elsewhere.
    pub fn remove_worker(&mut self, id: WorkerId) {
        if self.worker(id).is_some() {
            self.workers[id.index as usize] = None;
            self.leases.forget(id);
            self.speculation.forget(id);
        }
    }

    /// What live leases take of a worker.
    pub fn slots(&self, id: WorkerId) -> Slots {
        self.leases.slots(id)
    }

    /// What is known of each hardware class: its name, its workers now, its laws.
    pub fn rates(&self) -> Vec<(&str, usize, [Law; 4])> {
        let mut classes: Vec<_> = self.classes.iter().collect();
        classes.sort_by_key(|&(_, &class)| class);
        let count = |class: usize| {
            let workers = self.workers.iter().flatten();
            workers.filter(|worker| worker.class == class).count()
        };
        classes
            .into_iter()
            .map(|(name, class)| (name.as_str(), count(*class), self.rates[*class].laws()))
            .collect()
    }

    /// The leases.
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Requests held back, by plans and in line.
    pub fn held(&self) -> usize {
        self.waitlist.len() + self.line.len()
    }

    /// Requests that wait for room.
    pub fn in_line(&self) -> usize {
        self.line.len()
    }

    /// Leases whose blocks count as cached although no event said so yet.
    pub fn speculative(&self) -> usize {
        self.speculation.len()
    }

    /// How well predictions hold.
    pub fn errors(&self) -> Errors {
        self.errors
    }

    /// The factor by which a worker is slower than its class, as far as that is believed; None for an unknown worker.
    pub fn slowness(&self, id: WorkerId) -> Option<f64> {
        self.worker(id).map(|worker| worker.slower)
    }

    /// For simulations of bad measurements: durations that this worker's reports imply are misread by a factor.
    pub fn misread(&mut self, id: WorkerId, factor: f64) {
        if let Some(worker) = self.worker_mut(id) {
            worker.misread = factor;
        }
    }

    pub(crate) fn worker(&self, id: WorkerId) -> Option<&Worker> {
        let worker = self.workers.get(id.index as usize)?.as_ref()?;
        (worker.id == id).then_some(worker)
    }

    pub(crate) fn worker_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        let worker = self.workers.get_mut(id.index as usize)?.as_mut()?;
        (worker.id == id).then_some(worker)
    }

    // -- requests --

    /// Places a request, holds it for a plan, has it wait for room, or refuses it.
    pub fn submit(
        &mut self,
        mut request: Request,
        context: &mut Context<'_>,
    ) -> Result<(), NoWorker> {
        request.policy.get_or_insert(self.config.policy);
        if !self.can_place(&request) {
            return Err(NoWorker);
        }
        let (latest, why) = self.latest(&request, context);
        let held = Held {
            since: context.now,
            counted: context.now,
            latest,
            why,
            request,
        };
        if let Some(held) = self.admit(held, context) {
            let planned = self.plans(&held.request);
            self.place(held, context);
            if planned {
                self.replan(context);
            }
        }
        Ok(())
    }

    /// Places a request that has been admitted, or gives it to the plans.
    pub(crate) fn place(&mut self, held: Held, context: &mut Context<'_>) {
        if self.plans(&held.request) {
            self.hold(held, context);
            return;
        }
        let policy = held.request.policy.unwrap_or(self.config.policy);
        self.candidates(&held.request, policy, context);
        let at = self.choose(&held.request, policy, false, context);
        let winner = self.scratch.candidates[at];
        self.dispatch(held, winner, false, context);
    }

    /// Takes a request back that was held; false if it is not held any more.
    pub fn withdraw(&mut self, request: u64) -> bool {
        match self.waitlist.position(request) {
            Some(at) => {
                self.waitlist.remove(at);
                true
            }
            None => self.line.remove(request).is_some(),
        }
    }

    /// Accounts for a lease's progress and renews it; false for one that is not held.
    pub fn progress(&mut self, lease: u64, progress: Progress, context: &mut Context<'_>) -> bool {
        self.progress_moved(lease, progress, 0.0, context)
    }

    /// As [`Selector::progress`], of a split request whose engines measured how long its KV was on the way: `moved_ms`
    /// before its prompt was reported as computed.
    pub fn progress_moved(
        &mut self,
        lease: u64,
        progress: Progress,
        moved_ms: f64,
        context: &mut Context<'_>,
    ) -> bool {
        match self.note_progress(context.now, lease, progress, moved_ms) {
            // A renewal, and nothing else: what is held has not come closer.
            Some(false) => true,
            Some(true) => {
                self.replan(context);
                true
            }
            None => false,
        }
    }

    /// Ends a lease, however its request ended; false for one that is not held.
    pub fn end(&mut self, lease: u64, context: &mut Context<'_>) -> bool {
        let Some(ended) = self.leases.end(lease) else {
            return false;
        };
        self.released(context.now, lease, &ended);
        self.replan(context);
        true
    }

    /// Ends leases of which nothing was heard for too long, places what can be placed, and drops what was
    /// speculated and never confirmed. Call it at [`Selector::wakes_at`], and about every second. Returns the
    /// leases that expired.
    pub fn tick(&mut self, context: &mut Context<'_>) -> Vec<u64> {
        let expired = self.leases.expire(context.now);
        for (lease, ended) in &expired {
            self.released(context.now, *lease, ended);
        }
        self.speculation.expire(context.now);
        self.replan(context);
        expired.into_iter().map(|(lease, _)| lease).collect()
    }

    // -- events --

    /// A worker's device has these blocks now.
    pub fn stored(&mut self, id: WorkerId, hashes: &[u64]) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.stored(hashes.len());
            self.speculation.stored(id, hashes);
        }
    }

    /// A worker's device no longer has these blocks.
    pub fn removed(&mut self, now: f64, id: WorkerId, hashes: &[u64]) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.removed(now, hashes.len());
            self.returns.removed(hashes);
            self.speculation.removed(id, hashes);
        }
    }

    /// A worker's device has nothing any more, or nothing is known of it.
    pub fn cleared(&mut self, id: WorkerId) {
        if let Some(worker) = self.worker_mut(id) {
            worker.residency.cleared();
            self.speculation.forget(id);
        }
    }

    // -- the choice --

    /// The winner's position among the candidates in the scratch, or among the decode partners there.
    pub(crate) fn choose(
        &mut self,
        request: &Request,
        policy: PolicyName,
        partners: bool,
        context: &mut Context<'_>,
    ) -> usize {
        let Scratch {
            candidates,
            partners: decodes,
            costs,
            ..
        } = &mut self.scratch;
        let candidates = if partners { decodes } else { candidates };
        let judge = self
            .policies
            .entry((policy, partners))
            .or_insert_with(|| policy.make());
        costs.clear();
        judge.costs(request, candidates, context.chance, costs);
        let at = choose(
            costs,
            judge.margin(),
            self.config.temperature,
            context.chance,
        );
        judge.placed(&candidates[at]);
        at
    }

    /// Takes a lease out for one of a request's candidates, which are in the scratch where they are to be explained. It
    /// `joins` the pass of the prompt placed there before it, if so planned.
    pub(crate) fn dispatch(
        &mut self,
        held: Held,
        winner: Candidate,
        joins: bool,
        context: &mut Context<'_>,
    ) {
        let Held { request, since, .. } = held;
        let shadows = self.cast_shadows(&request, &winner, context);
        let lease = self.new_lease(context.chance);
        let cached: u32 = winner.cached.iter().sum();
        let uncached = request.prompt_tokens.max(1) - cached;
        let workers = (winner.prefill, winner.decode);
        let tokens = (request.prompt_tokens, uncached);
        self.leases
            .take(context.now, lease, request.id, workers, tokens);
        self.tail.observe(winner.terms.prefill);
        let mut ms = winner.terms.prefill + winner.terms.onboard;
        if let Some(worker) = self.worker(winner.prefill).filter(|_| joins) {
            let rates = &self.rates[worker.class];
            let seat = Seat::new(context.now, worker, rates, self.leases.slots(worker.id));
            ms = (ms - seat.pass_ms()).max(0.0);
        }
        if let Some(worker) = self.worker_mut(winner.prefill) {
            let [_, host, nvme, network] = winner.cached;
            let entry = Waiting {
                lease,
                work: Work::of(uncached, cached, worker.pass_tokens),
                ms,
                onboard: [host, nvme, network],
                placed: context.now,
                expected: Some(winner.terms.queue + ms),
            };
            worker.queue.push(context.now, entry);
        }
        self.note_misses(&request, cached / self.config.block_tokens);
        self.speculation.add(lease, winner.prefill, request.blocks);
        let policy = request.policy.unwrap_or(self.config.policy);
        let (mut candidates, mut costs) = (Vec::new(), Vec::new());
        if self.config.explain || request.explain {
            candidates.clone_from(&self.scratch.candidates);
            // A plan has no costs of its own.
            match policy {
                PolicyName::Kv => costs.extend(candidates.iter().map(|one| one.terms.total())),
                _ => costs.clone_from(&self.scratch.costs),
            }
        }
        context.placed.push(Placed {
            request: request.id,
            lease,
            winner,
            policy,
            candidates,
            costs,
            held_ms: context.now - since,
            shadows,
        });
    }

    fn new_lease(&self, chance: &mut dyn RngCore) -> u64 {
        // Random, so that a report that reaches the wrong router finds nothing there.
        loop {
            let id = chance.random();
            if id != 0 && self.leases.get(id).is_none() {
                return id;
            }
        }
    }
}
