//! The selector: workers, leases, speculation, rates and policies put together. The service's way in.

use rand::RngCore;
use rustc_hash::FxHashMap;

use crate::{
    accuracy::Errors,
    admission::Refused,
    config::Config,
    drain::Drain,
    eviction::Returns,
    held::{Held, Waitlist},
    line::Line,
    policy::{Policy, PolicyName},
    rates::ClassRates,
    reports::{Report, Stream},
    scratch::Scratch,
    shadow::Shadow,
    slots::{Leases, Progress},
    speculation::Speculation,
    tail::Tail,
    types::{Lookup, Placed, Request},
    worker::Worker,
};

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
    /// By lease, from the computed prompt on.
    pub(crate) streams: FxHashMap<u64, Stream>,
    pub(crate) tail: Tail,
    /// How often workers came, left or evicted something.
    pub(crate) evictions_changed: u64,
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
            evictions_changed: 0,
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

    /// Blocks that count as cached although no event said so yet, and a digest of them: equal in replicas that agree.
    pub fn speculated(&self) -> (usize, u64) {
        self.speculation.digest()
    }

    /// How well predictions hold.
    pub fn errors(&self) -> Errors {
        self.errors
    }

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
            passed: 0,
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
        let weighed = self
            .weighed(&held.request)
            .with(&winner, self.scratch.costs[at]);
        self.dispatch(held, winner, weighed, false, context);
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
        let report = Report {
            lease,
            prefilled: progress.prefilled,
            output_tokens: progress.output_tokens,
            transfer_ms: moved_ms,
            ended: false,
        };
        self.report(&[report], context).is_empty()
    }

    /// Accounts for how leases fare, and then places what can be placed: once, with all of it known. Returns the leases that
    /// are not held.
    pub fn report(&mut self, reports: &[Report], context: &mut Context<'_>) -> Vec<u64> {
        let mut unknown = Vec::new();
        let mut moved = false;
        for report in reports {
            let Some(more) = self.note_progress(context.now, report) else {
                unknown.push(report.lease);
                continue;
            };
            // A renewal, and nothing else, brings nothing that is held closer.
            moved |= more || report.ended;
            if report.ended {
                self.note_end(context.now, report.lease);
            }
        }
        if moved {
            self.replan(context);
        }
        unknown
    }

    /// Ends a lease, however its request ended; false for one that is not held.
    pub fn end(&mut self, lease: u64, context: &mut Context<'_>) -> bool {
        let held = self.note_end(context.now, lease);
        if held {
            self.replan(context);
        }
        held
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
        self.note_idle(context.now);
        self.replan(context);
        expired.into_iter().map(|(lease, _)| lease).collect()
    }
}
