//! When the selector lets requests wait in line, and when it releases, refuses or forgets them.
//!
//! While some worker has room nothing waits, and nothing here decides anything. Else requests wait in a [`Line`], for which
//! no thread waits and from which they can be withdrawn at once; every call that changes what workers have releases
//! those that fit. Each leaves at the latest when its time is over, so nothing waits for ever, whatever workers do.
//!
//! Joint plans choose freely among those that they hold; while there is a line they are given few at a time, so that its
//! order holds.

use smallvec::SmallVec;

use crate::{
    admission::{Reason, Refused},
    cost::Cached,
    held::Held,
    joint::SOONEST_MS,
    line::Measure,
    policy::PolicyName,
    rates::Work,
    selector::{Context, Selector},
    types::{Request, Role},
};

/// Requests a worker that computes prompts has to choose from, while others wait in line.
const CHOICES: usize = 4;
/// Milliseconds: what a refused request is told at least and at most.
const RETRY_MS: (f64, f64) = (100.0, 60_000.0);

/// Room for one more request.
struct Room {
    /// On some worker, or some pair.
    anywhere: bool,
    /// In the pool of a worker that generates.
    pool: bool,
}

impl Selector {
    /// Has a request wait in line if it must; else hands it back.
    pub(crate) fn admit(&mut self, held: Held, context: &mut Context<'_>) -> Option<Held> {
        if held.request.deadline.is_some() && held.latest <= context.now {
            self.refuse(held, Reason::Deadline, context);
            return None;
        }
        if !self.must_wait(&held.request, context.now) {
            return Some(held);
        }
        let now = context.now;
        self.drain.advance(now, !self.line.is_empty());
        let tenant = held.request.tenant;
        let bounds = &self.config.admission;
        // More than leave in time, those included that plans hold.
        let before = (self.line.tokens() + self.waitlist.tokens()) as f64;
        let in_time = self
            .drain
            .rate()
            .map_or(f64::INFINITY, |rate| rate * bounds.max_wait_ms);
        let over = !self.line.is_empty() && before > in_time;
        self.line.push(held);
        let measure = if self.line.len() > bounds.max_held {
            Some(Measure::Requests)
        } else {
            over.then_some(Measure::Tokens)
        };
        let refused = measure.and_then(|by| self.line.give_up(by, tenant, bounds));
        if let Some(refused) = refused {
            self.refuse(refused, Reason::Full, context);
        }
        self.replan(context);
        None
    }

    /// When a request must be placed at the latest, and for what reason: before it has waited too long, and so that an idle
    /// worker could meet its deadline.
    pub(crate) fn latest(&mut self, request: &Request, context: &mut Context<'_>) -> (f64, Reason) {
        let patient = context.now + self.config.admission.max_wait_ms;
        let meets = request
            .deadline
            .map(|deadline| deadline - self.soonest_ms(request, context));
        match meets {
            Some(latest) if latest < patient => (latest, Reason::Deadline),
            _ => (patient, Reason::Waited),
        }
    }

    /// What the first token takes on the best worker, were all idle.
    fn soonest_ms(&mut self, request: &Request, context: &mut Context<'_>) -> f64 {
        self.find(request, context);
        let workers = self.workers.iter().flatten();
        let own = workers
            .filter(|worker| worker.role != Role::Decode && worker.takes(request))
            .map(|worker| {
                let depth = self.scratch.depth(worker.id);
                let cached = Cached::of(depth, request.prompt_tokens, self.config.block_tokens);
                let work = Work::of(cached.uncached, cached.total(), worker.pass_tokens);
                let rates = &self.rates[worker.class];
                let [_, below @ ..] = cached.tokens;
                worker.slower * (rates.prefill_ms(&work) + rates.onboard_ms(below))
            });
        own.fold(f64::INFINITY, f64::min)
    }

    /// Changes how many requests may wait, and how long those that come from now on. What is too much now is refused at once, as
    /// it would have been on arrival; whoever waits keeps the time that it was given.
    pub fn set_bounds(&mut self, max_held: usize, max_wait_ms: f64, context: &mut Context<'_>) {
        self.config.admission.max_held = max_held;
        self.config.admission.max_wait_ms = max_wait_ms;
        while self.line.len() > max_held {
            // Nobody asked for more just now.
            let Some(held) = self
                .line
                .give_up(Measure::Requests, 0, &self.config.admission)
            else {
                return;
            };
            self.refuse(held, Reason::Full, context);
        }
    }

    /// Releases from the line what there is room for.
    pub(crate) fn release(&mut self, context: &mut Context<'_>) {
        if self.line.is_empty() {
            return;
        }
        self.drain.advance(context.now, true);
        while self.may_release(context.now) {
            let Some(mut held) = self.line.pop(&self.config.admission) else {
                return;
            };
            held.counted = context.now;
            self.drain
                .left(u64::from(held.request.prompt_tokens.max(1)));
            if self.can_place(&held.request) {
                self.place(held, context);
            } else {
                self.refuse(held, Reason::NoWorker, context);
            }
        }
    }

    pub(crate) fn may_release(&self, now: f64) -> bool {
        !self.line.is_empty() && self.waitlist.len() < self.choices() && self.room(now).anywhere
    }

    /// Refuses those whose time is over.
    pub(crate) fn give_up(&mut self, context: &mut Context<'_>) {
        while let Some(at) = self.waitlist.late(context.now) {
            let held = self.waitlist.remove(at);
            let why = held.why;
            self.refuse(held, why, context);
        }
        while let Some(held) = self.line.late(context.now) {
            let why = held.why;
            self.refuse(held, why, context);
        }
    }

    fn refuse(&self, held: Held, reason: Reason, context: &mut Context<'_>) {
        let tokens = self.line.tokens() as f64;
        let drained = match self.drain.rate() {
            _ if tokens == 0.0 => 0.0,
            Some(rate) => tokens / rate,
            None => self.config.admission.max_wait_ms,
        };
        context.refused.push(Refused {
            request: held.request.id,
            retry_after_ms: drained.clamp(RETRY_MS.0, RETRY_MS.1),
            reason,
            held_ms: context.now - held.since,
        });
    }

    /// When there may be room for the line, should nothing happen before.
    pub(crate) fn releases_at(&self, now: f64) -> Option<f64> {
        if self.line.is_empty() {
            return None;
        }
        if self.may_release(now) {
            return Some(now);
        }
        let most = self.config.admission.backlog_ms;
        // One that has time already waits for something else: for blocks, or for a half of its pool.
        let over = self
            .prefilling()
            .map(|worker| worker.queue.backlog_ms(now) - most)
            .filter(|&ms| ms > 0.0);
        let soonest = over.fold(f64::INFINITY, f64::min);
        soonest.is_finite().then(|| now + soonest.max(SOONEST_MS))
    }

    /// When the time of the first held request is over.
    pub(crate) fn gives_up_at(&self) -> Option<f64> {
        let first = self
            .waitlist
            .earliest()
            .min(self.line.earliest().unwrap_or(f64::INFINITY));
        first.is_finite().then_some(first)
    }

    fn must_wait(&self, request: &Request, now: f64) -> bool {
        if !self.line.is_empty() {
            return true;
        }
        let room = self.room(now);
        match self.plans(request) {
            true => !room.pool || !room.anywhere && self.waitlist.len() >= self.choices(),
            false => !room.anywhere,
        }
    }

    /// Whether a request is placed by joint plans.
    pub(crate) fn plans(&self, request: &Request) -> bool {
        let policy = request.policy.unwrap_or(self.config.policy);
        self.config.joint && policy == PolicyName::Kv && self.config.temperature <= 0.0
    }

    /// Requests that plans hold while there is a line.
    fn choices(&self) -> usize {
        let wanted = CHOICES * self.prefilling().count().max(1);
        wanted.min(self.most_held())
    }

    fn room(&self, now: f64) -> Room {
        let bounds = &self.config.admission;
        // Of each pool: whether a worker that computes prompts has room, and one that generates.
        let mut halves: SmallVec<[(u32, bool, bool); 1]> = SmallVec::new();
        let mut pool = false;
        for worker in self.workers.iter().flatten() {
            let queue = worker.queue.backlog_ms(now) <= bounds.backlog_ms;
            let own = self.leases.slots(worker.id).own_blocks as f64;
            let fits = own < bounds.pool_share * f64::from(worker.blocks);
            match worker.role {
                Role::Aggregated if queue && fits => {
                    return Room {
                        anywhere: true,
                        pool: true,
                    };
                }
                Role::Aggregated => pool |= fits,
                role => {
                    let known = halves.iter().position(|half| half.0 == worker.pool);
                    let at = known.unwrap_or_else(|| {
                        halves.push((worker.pool, false, false));
                        halves.len() - 1
                    });
                    halves[at].1 |= role == Role::Prefill && queue;
                    halves[at].2 |= role == Role::Decode && fits;
                }
            }
        }
        Room {
            anywhere: halves.iter().any(|half| half.1 && half.2),
            pool: pool || halves.iter().any(|half| half.2),
        }
    }
}
