//! One worker as the selector knows it, and what it learns from its reports.

use crate::{
    eviction::Residency,
    links::Links,
    pace::{Pace, SideBySide},
    queue::{Queue, Waiting},
    rates::{ClassRates, Work},
    types::{Request, Role, WorkerId, WorkerSpec},
};

/// Reports of prompts computed in one pass come within this time.
const SAME_PASS_MS: f64 = 1.0;
/// A worker that counts as slow, and so gets nothing to do, is thought a little better of each time it had nothing for so
/// long: after some two minutes it is tried again.
const IDLE_MS: f64 = 10_000.0;

/// Prompts that one stretch of an engine's time was spent on.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Stretch {
    begin: f64,
    end: f64,
    work: Work,
    onboard: [u32; 3],
    decode_ms: f64,
}

/// A worker in the selector's table.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Worker {
    pub id: WorkerId,
    pub key: u64,
    pub role: Role,
    pub class: usize,
    pub pool: u32,
    pub blocks: u32,
    pub pass_tokens: u32,
    /// Sorted.
    offers: Vec<u64>,
    pub pace: Pace,
    /// When that was last learned or faded.
    paced: f64,
    steps: SideBySide,
    /// `pace.factor()`, which every decision needs.
    pub slower: f64,
    /// By which it receives KV.
    pub links: Links,
    /// Factor by which durations are misread; 1 but in simulations.
    pub misread: f64,
    pub queue: Queue,
    pub residency: Residency,
    /// Milliseconds it has spent on prompts.
    pub busy_ms: f64,
    last: Option<Stretch>,
}

impl Worker {
    pub fn new(id: WorkerId, class: usize, spec: &WorkerSpec) -> Self {
        let mut offers = spec.offers.clone();
        offers.sort_unstable();
        Self {
            id,
            key: spec.key,
            role: spec.role,
            class,
            pool: spec.pool,
            blocks: spec.blocks.max(1),
            pass_tokens: spec.pass_tokens.max(1),
            offers,
            pace: Pace::default(),
            paced: 0.0,
            steps: SideBySide::default(),
            slower: 1.0,
            links: Links::default(),
            misread: 1.0,
            queue: Queue::default(),
            residency: Residency::default(),
            busy_ms: 0.0,
            last: None,
        }
    }

    /// Whether a request may go to it, busy or not.
    pub fn takes(&self, request: &Request) -> bool {
        let offered = |need: &u64| self.offers.binary_search(need).is_ok();
        request.needs.iter().all(offered) && !request.exclude.contains(&self.id)
    }

    /// A prompt has been computed: learn from how long it took. `decode_ms` is what streams there take of each pass.
    pub fn computed(
        &mut self,
        now: f64,
        lease: u64,
        decode_ms: f64,
        rates: &mut ClassRates,
    ) -> Option<Waiting> {
        let begin = self.queue.since();
        let entry = self.queue.computed(now, lease)?;
        match &mut self.last {
            // The same pass computed several.
            Some(last) if now - last.end < SAME_PASS_MS => {
                last.work = together(&last.work, &entry.work);
                for tier in 0..3 {
                    last.onboard[tier] += entry.onboard[tier];
                }
            }
            _ => {
                if let Some(last) = self.last.take() {
                    self.learn(&last, rates);
                }
                self.busy_ms += (now - begin).max(0.0);
                self.last = Some(Stretch {
                    begin,
                    end: now,
                    work: entry.work,
                    onboard: entry.onboard,
                    decode_ms,
                });
            }
        }
        Some(entry)
    }

    /// A stream of this worker, which does nothing else, took `actual` ms where its class takes `expected`.
    pub fn stepped(&mut self, now: f64, expected: f64, actual: f64) {
        if let Some(factor) = self.steps.observe(now, expected, self.misread * actual) {
            self.learn_pace(now, 1.0, factor);
        }
    }

    /// It has nothing to do.
    pub fn idle(&mut self, now: f64) {
        if self.slower != 1.0 && now - self.paced >= IDLE_MS {
            self.pace.fade();
            self.slower = self.pace.factor();
            self.paced = now;
        }
    }

    fn learn_pace(&mut self, now: f64, expected: f64, actual: f64) {
        self.pace.observe(expected, actual);
        self.slower = self.pace.factor();
        self.paced = now;
    }

    fn learn(&mut self, stretch: &Stretch, rates: &mut ClassRates) {
        let actual = self.misread * (stretch.end - stretch.begin);
        let aside = stretch.work.passes() * stretch.decode_ms;
        let onboard = rates.onboard_ms(stretch.onboard);
        let prefill = rates.prefill_ms(&stretch.work);
        self.learn_pace(stretch.end, prefill + aside + onboard, actual);
        // What it would have been at the class' pace.
        let common = actual / self.slower;
        if stretch.onboard == [0; 3] {
            rates.observe_prefill(&stretch.work, common - aside);
        } else {
            rates.observe_onboard(stretch.onboard, common - aside - prefill);
        }
    }
}

/// Two prompts of one pass: computed at once, and so squared together where each is a single pass.
fn together(a: &Work, b: &Work) -> Work {
    let mut both = a.and(b);
    both.features[0] = a.features[0].max(b.features[0]);
    if both.features[0] == 1.0 {
        both.features[2] = both.features[1] * both.features[1];
    }
    both
}
