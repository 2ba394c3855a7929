//! The selector's joint plans: when they are made, from what, and what of them is carried out.
//!
//! A request is held while every worker it could go to has prompts to compute; each arrival and each computed prompt
//! makes a new plan over all that are held, and of it only what a free worker should begin with is carried out. So
//! nothing is decided before it must be, and a plan that turned out wrong costs nothing.

use std::cell::RefCell;

use rand::seq::SliceRandom;
use rustc_hash::FxHashMap;

use crate::{
    cost::{Cached, Seat},
    explain::Weighed,
    held::{Held, Sheet},
    plan::{Entry, Own, Plan},
    policy::PolicyName,
    rates::Work,
    selector::{Context, Selector},
    types::{Candidate, Role, WorkerId},
    worker::Worker,
};

/// Requests held at most; of more the oldest of the most urgent is placed where it costs least.
const MOST_HELD: usize = 48;
/// Requests times workers in one plan at most, so that a plan stays quick on large clusters.
const MOST_ENTRIES: usize = 2_048;
/// A worker is free that will have computed its prompts within so many milliseconds: the next should be there by then.
/// Where streams are, within a step of theirs, which the next would else have to wait for.
const SLACK_MS: f64 = 10.0;
/// Milliseconds between two looks that nothing caused.
pub(crate) const SOONEST_MS: f64 = 1.0;

/// A request that a free worker should begin with.
struct First {
    /// Its position in the waitlist.
    item: usize,
    winner: Candidate,
    /// What it was chosen from, when the plan was made.
    weighed: Weighed,
}

impl Selector {
    /// When [`Selector::tick`] is due, should nothing happen before; None when no request is held.
    pub fn wakes_at(&self, now: f64) -> Option<f64> {
        let times = [
            self.plans_at(now),
            self.releases_at(now),
            self.gives_up_at(),
        ];
        times.into_iter().flatten().reduce(f64::min)
    }

    fn plans_at(&self, now: f64) -> Option<f64> {
        if self.waitlist.is_empty() {
            return None;
        }
        if self.gathering.is_some() {
            return self.gathering;
        }
        // A worker that is free already was passed over on purpose: who joins or leaves has a plan made at once.
        let busy = self
            .prefilling()
            .map(|worker| self.until_free_ms(worker, now));
        let next = busy.filter(|&ms| ms > 0.0).fold(f64::INFINITY, f64::min);
        next.is_finite().then(|| now + next.max(SOONEST_MS))
    }

    /// Has the next look make a plan for what is held: what passed free workers over did so with others in view than there
    /// are now.
    pub(crate) fn plan_anew(&mut self) {
        if !self.waitlist.is_empty() {
            self.gathering.get_or_insert(0.0);
        }
    }

    /// Requests that plans hold at most.
    pub(crate) fn most_held(&self) -> usize {
        let most = MOST_HELD.min(MOST_ENTRIES / self.workers.len().max(1));
        most.max(1)
    }

    /// Holds a request until the next plan.
    pub(crate) fn hold(&mut self, held: Held, context: &mut Context<'_>) {
        self.waitlist.push(held);
        if self.gathering.is_none() {
            self.gathering = Some(context.now + self.config.gather_ms);
        }
        let aging = self.config.admission.aging;
        while self.waitlist.len() > self.most_held() {
            let Some((urgency, at)) = self.waitlist.first(aging) else {
                break;
            };
            let first = self.waitlist.remove(at);
            self.candidates(&first.request, PolicyName::Kv, context);
            if self.scratch.candidates.is_empty() {
                // Its workers left meanwhile; it waits for others.
                self.waitlist.push(first);
                break;
            }
            let at = self.choose(&first.request, PolicyName::Kv, false, context);
            let winner = self.scratch.candidates[at];
            let weighed = self
                .weighed(&first.request)
                .with(&winner, self.scratch.costs[at]);
            self.dispatch(first, winner, weighed, false, context);
            self.waitlist.let_pass(urgency, 1, aging);
        }
    }

    /// Refuses what is late, and places what can be placed now.
    pub(crate) fn replan(&mut self, context: &mut Context<'_>) {
        self.give_up(context);
        loop {
            self.release(context);
            self.place_planned(context);
            if !self.may_release(context.now) {
                return;
            }
        }
    }

    /// Plans for all that are held, and places what free workers should begin with.
    fn place_planned(&mut self, context: &mut Context<'_>) {
        if self.gathering.is_some_and(|until| context.now < until) {
            return;
        }
        self.gathering = None;
        let aging = self.config.admission.aging;
        while self.any_free(context.now) {
            let Some((urgency, firsts)) = self.firsts(context) else {
                return;
            };
            let placed = firsts.len() as u32;
            self.begin(firsts, context);
            self.waitlist.let_pass(urgency, placed, aging);
        }
    }

    /// What free workers should begin with, of the most urgent class for which that is anything; and how urgent it is.
    fn firsts(&mut self, context: &mut Context<'_>) -> Option<(i32, Vec<First>)> {
        let classes = self.waitlist.classes(self.config.admission.aging);
        classes.into_iter().find_map(|(urgency, items)| {
            let firsts = match items[..] {
                [item] => self.plan_one(item, context),
                _ => self.plan(&items, context),
            };
            (!firsts.is_empty()).then_some((urgency, firsts))
        })
    }

    /// Places requests that are in the waitlist; those of one worker follow each other and share a pass.
    fn begin(&mut self, firsts: Vec<First>, context: &mut Context<'_>) {
        let mut positions: Vec<usize> = firsts.iter().map(|first| first.item).collect();
        positions.sort_unstable();
        let mut taken: FxHashMap<usize, Held> = FxHashMap::default();
        for &item in positions.iter().rev() {
            taken.insert(item, self.waitlist.remove(item));
        }
        let mut before = None;
        for first in firsts {
            let Some(held) = taken.remove(&first.item) else {
                continue;
            };
            let (mut winner, mut weighed) = (first.winner, first.weighed);
            let joins = before == Some(winner.prefill);
            before = Some(winner.prefill);
            if joins {
                // What came before in the pass may have brought a prefix that it shares.
                self.candidates(&held.request, PolicyName::Kv, context);
                let mut candidates = self.scratch.candidates.iter();
                let here = candidates.find(|candidate| candidate.prefill == winner.prefill);
                winner = *here.unwrap_or(&winner);
                weighed = self
                    .weighed_planned(&held.request)
                    .with(&winner, winner.terms.total());
            }
            self.dispatch(held, winner, weighed, joins, context);
        }
    }

    pub(crate) fn prefilling(&self) -> impl Iterator<Item = &Worker> {
        let workers = self.workers.iter().flatten();
        workers.filter(|worker| worker.role != Role::Decode)
    }

    fn any_free(&self, now: f64) -> bool {
        self.prefilling()
            .any(|worker| self.until_free_ms(worker, now) <= 0.0)
    }

    /// Milliseconds until a prompt should be on its way to a worker; not above 0 where it should be now.
    fn until_free_ms(&self, worker: &Worker, now: f64) -> f64 {
        let slots = self.leases.slots(worker.id);
        self.until_seat_free_ms(&Seat::new(now, worker, &self.rates[worker.class], slots))
    }

    fn until_seat_free_ms(&self, seat: &Seat<'_>) -> f64 {
        let astray = self.errors.share() * seat.worker.queue.predicted_ms();
        seat.backlog_ms - SLACK_MS.max(seat.step_ms).max(astray)
    }

    /// As [`Self::plan`] does, for a request alone in its class: where it costs least, if that worker is free.
    fn plan_one(&mut self, item: usize, context: &mut Context<'_>) -> Vec<First> {
        let request = std::mem::take(&mut self.waitlist.get_mut(item).request);
        self.candidates(&request, PolicyName::Kv, context);
        let mut first = Vec::new();
        if !self.scratch.candidates.is_empty() {
            let at = self.choose(&request, PolicyName::Kv, false, context);
            let winner = self.scratch.candidates[at];
            let worker = self.worker(winner.prefill);
            if worker.is_some_and(|worker| self.until_free_ms(worker, context.now) <= 0.0) {
                let weighed = self.weighed(&request).with(&winner, self.scratch.costs[at]);
                first.push(First {
                    item,
                    winner,
                    weighed,
                });
            }
        }
        self.waitlist.get_mut(item).request = request;
        first
    }

    /// What each free worker should begin with of a class.
    fn plan(&mut self, class: &[usize], context: &mut Context<'_>) -> Vec<First> {
        let mut columns: Vec<WorkerId> = self.prefilling().map(|worker| worker.id).collect();
        // Of equal workers a plan takes the first.
        columns.shuffle(&mut *context.chance);
        // By a worker's index: its column.
        let mut numbers = vec![usize::MAX; self.workers.len()];
        for (column, id) in columns.iter().enumerate() {
            numbers[id.index as usize] = column;
        }
        let items = class.len();
        let mut entries = vec![Entry::NOWHERE; items * columns.len()];
        // All candidates, item by item, and where each item's begin.
        let mut candidates = std::mem::take(&mut self.scratch.planned);
        candidates.clear();
        let mut begins = Vec::with_capacity(items + 1);
        let mut weighed = Vec::with_capacity(items);
        for (item, &position) in class.iter().enumerate() {
            let request = std::mem::take(&mut self.waitlist.get_mut(position).request);
            self.candidates(&request, PolicyName::Kv, context);
            for candidate in &self.scratch.candidates {
                let at = item * columns.len() + numbers[candidate.prefill.index as usize];
                entries[at] = Entry::of(candidate, request.prompt_tokens, self.config.block_tokens);
            }
            begins.push(candidates.len());
            candidates.extend_from_slice(&self.scratch.candidates);
            weighed.push(self.weighed_planned(&request));
            self.waitlist.get_mut(position).request = request;
        }
        let seats: Vec<Seat<'_>> = columns
            .iter()
            .filter_map(|&id| {
                let worker = self.worker(id)?;
                let rates = &self.rates[worker.class];
                Some(Seat::new(context.now, worker, rates, self.leases.slots(id)))
            })
            .collect();
        let own = |item: usize, column: usize, cached: u32| {
            let prompt = self.waitlist.get(class[item]).request.prompt_tokens;
            let cached = Cached::of([cached; 4], prompt, self.config.block_tokens);
            let seat = &seats[column];
            let work = Work::of(cached.uncached, cached.total(), seat.worker.pass_tokens);
            Own {
                ms: seat.own_ms(&work, seat.rates.prefill_ms(&work)),
                tokens: cached.uncached,
            }
        };
        let sheet = Sheet {
            waitlist: &self.waitlist,
            items: class,
            now: context.now,
            columns: columns.len(),
            entries,
            own,
            passes: seats
                .iter()
                .map(|seat| Own {
                    ms: seat.pass_ms(),
                    tokens: seat.worker.pass_tokens,
                })
                .collect(),
            known: RefCell::default(),
        };
        let backlogs: Vec<f64> = seats.iter().map(|seat| seat.backlog_ms).collect();
        let passes = Plan::make(
            &sheet,
            items,
            &backlogs,
            self.tail.ms(),
            self.config.prices.fresh,
        );
        begins.push(candidates.len());
        let mut firsts = Vec::new();
        for (column, pass) in passes.iter().enumerate() {
            if self.until_seat_free_ms(&seats[column]) <= 0.0 {
                let first = |&item: &usize| {
                    let of_item = &candidates[begins[item]..begins[item + 1]];
                    let here = |candidate: &&Candidate| candidate.prefill == columns[column];
                    let winner = *of_item.iter().find(here)?;
                    Some(First {
                        item: class[item],
                        winner,
                        weighed: std::mem::take(&mut weighed[item])
                            .with(&winner, winner.terms.total()),
                    })
                };
                firsts.extend(pass.iter().filter_map(first));
            }
        }
        self.scratch.planned = candidates;
        firsts
    }
}

impl Entry {
    const NOWHERE: Self = Self {
        cached: 0,
        own: Own {
            ms: f64::INFINITY,
            tokens: 0,
        },
        extra_ms: 0.0,
        aside_ms: 0.0,
        share: 0.0,
    };

    fn of(candidate: &Candidate, prompt_tokens: u32, block_tokens: u32) -> Self {
        let terms = &candidate.terms;
        let uncached = prompt_tokens.max(1) - candidate.cached.iter().sum::<u32>();
        Self {
            cached: candidate.cached.iter().sum::<u32>() / block_tokens,
            own: Own {
                ms: terms.prefill,
                tokens: uncached,
            },
            extra_ms: terms.onboard + terms.transfer,
            aside_ms: terms.decode + terms.evict,
            share: (terms.work + terms.streams) / terms.prefill.max(f64::MIN_POSITIVE),
        }
    }
}
