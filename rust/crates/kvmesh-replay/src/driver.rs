//! A selector and all that it needs, every call of which can be written and made again.

use kvmesh_select::{
    Context, Lookup, NoWorker, Placed, Policy, PolicyName, Progress, Refused, Request, Selector,
    Shadow, WorkerId,
};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{
    input::{Answer, Input},
    line::{Outcome, Snapshot},
    log::{Log, LogStats, Need},
    lookups::{Answered, Memo, Noting},
    witness::{Judged, Witnessed},
};

pub use crate::input::Changes;

/// A policy that is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnknownName(pub String);

/// Judges that look on, by a policy of the caller's: of placements, and of decode partners.
pub type Judges = (Box<dyn Policy>, Box<dyn Policy>);

/// Owns a selector. What its calls brought about is in `placed` and `refused` until they are taken.
pub struct Driver<L> {
    /// To look at; to be told things by [`Driver::call`] only.
    selector: Selector,
    /// Where cached prefixes are.
    pub lookup: L,
    chance: ChaCha8Rng,
    /// Of selections, which are not in the log.
    aside: ChaCha8Rng,
    /// Placements since they were last taken.
    pub placed: Vec<Placed>,
    /// Refusals since they were last taken.
    pub refused: Vec<Refused>,
    policies: Vec<String>,
    judged: Judged,
    workers: FxHashMap<WorkerId, String>,
    log: Option<Log>,
    memo: Memo,
}

impl<L: Lookup> Driver<L> {
    /// A selector whose chance is this seed's.
    pub fn new(selector: Selector, lookup: L, seed: u64) -> Self {
        Self::with(selector, lookup, ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn with(selector: Selector, lookup: L, chance: ChaCha8Rng) -> Self {
        let mut aside = chance.clone();
        aside.set_stream(1);
        Self {
            aside,
            selector,
            lookup,
            chance,
            placed: Vec::new(),
            refused: Vec::new(),
            policies: Vec::new(),
            judged: Judged::default(),
            workers: FxHashMap::default(),
            log: None,
            memo: Memo::default(),
        }
    }

    /// To look at.
    pub fn selector(&self) -> &Selector {
        &self.selector
    }

    pub(crate) fn selector_mut(&mut self) -> &mut Selector {
        &mut self.selector
    }

    pub(crate) fn judged(&self) -> &Judged {
        &self.judged
    }

    /// Writes every call from now on.
    pub fn open_log(&mut self, log: Log) {
        self.log = Some(log);
    }

    /// Writes what is queued, and nothing more. Waits for the disk.
    pub fn close_log(&mut self) {
        self.log = None;
    }

    /// What became of the log; None without one.
    pub fn log_stats(&self) -> Option<LogStats> {
        self.log.as_ref().map(Log::stats)
    }

    /// Names of policies from outside, by their numbers.
    pub fn policies(&self) -> &[String] {
        &self.policies
    }

    pub(crate) fn set_names(&mut self, policies: Vec<String>, workers: Vec<(WorkerId, String)>) {
        self.policies = policies;
        self.workers = workers.into_iter().collect();
    }

    pub(crate) fn worker_names(&self) -> &FxHashMap<WorkerId, String> {
        &self.workers
    }

    /// The policy of a name.
    pub fn policy(&self, name: &str) -> Result<PolicyName, UnknownName> {
        match self.policies.iter().position(|known| known == name) {
            Some(number) => Ok(PolicyName::External(number as u16)),
            None => name
                .parse()
                .map_err(|error: kvmesh_select::UnknownPolicy| UnknownName(error.to_string())),
        }
    }

    /// Adds a policy of the caller's: what judges placements, and what judges decode partners.
    pub fn add_policy(&mut self, now: f64, name: String, (judge, partners): Judges) {
        let number = self.policies.len() as u16;
        let witnessed = |inner| {
            Box::new(Witnessed {
                inner,
                judged: self.judged.clone(),
            })
        };
        let (judge, partners) = (witnessed(judge), witnessed(partners));
        self.selector.add_policy(number, judge, partners);
        self.call(now, Input::AddPolicy { name });
    }

    /// As [`Input::Stored`], without a copy where nobody writes.
    pub fn stored(&mut self, now: f64, worker: WorkerId, hashes: &[u64]) {
        match self.log {
            None => self.selector.stored(worker, hashes),
            Some(_) => {
                let hashes = hashes.into();
                self.call(now, Input::Stored { worker, hashes });
            }
        }
    }

    /// As [`Input::Removed`], without a copy where nobody writes.
    pub fn removed(&mut self, now: f64, worker: WorkerId, hashes: &[u64]) {
        match self.log {
            None => self.selector.removed(now, worker, hashes),
            Some(_) => {
                let hashes = hashes.into();
                self.call(now, Input::Removed { worker, hashes });
            }
        }
    }

    /// Changes what holds from now on; all of it, or nothing where a name is unknown. `external` are the judges of shadows
    /// that are policies of the caller's.
    pub fn set(
        &mut self,
        now: f64,
        changes: Changes,
        external: impl FnMut(&str) -> Option<Judges>,
    ) -> Result<(), UnknownName> {
        let policy = changes.policy.as_deref().map(|name| self.policy(name));
        policy.transpose()?;
        if let Some(names) = &changes.shadows {
            let shadows = self.shadows(names, external)?;
            self.selector.set_shadows(shadows);
        }
        self.call(now, Input::Set(changes));
        Ok(())
    }

    fn shadows(
        &self,
        names: &[String],
        mut external: impl FnMut(&str) -> Option<Judges>,
    ) -> Result<Vec<Shadow>, UnknownName> {
        let shadow = |name: &String| match self.policy(name)? {
            PolicyName::External(number) => external(name)
                .map(|(judge, partners)| Shadow::external(number, judge, partners))
                .ok_or_else(|| UnknownName(format!("policy `{name}` cannot look on"))),
            policy => Ok(Shadow::new(Some(policy))),
        };
        names.iter().map(shadow).collect()
    }

    /// As [`Selector::select`]. It is not written: no later call comes out otherwise because of it.
    pub fn select(&mut self, now: f64, request: &Request) -> Result<Placed, NoWorker> {
        let context = &mut Context {
            now,
            lookup: &mut self.lookup,
            chance: &mut self.aside,
            placed: &mut Vec::new(),
            refused: &mut Vec::new(),
        };
        let selected = self.selector.select(request, context);
        self.judged.take();
        selected
    }

    /// Makes a call.
    pub fn call(&mut self, now: f64, input: Input) -> Answer {
        let line = self.begin_line(now, &input);
        let (placed, refused) = (self.placed.len(), self.refused.len());
        let answer = self.apply(now, input);
        if let (Some(line), Some(log)) = (line, &mut self.log) {
            let said = Said {
                found: self.memo.take(),
                judged: self.judged.take(),
                answer: &answer,
                out: Outcome::of(&self.placed[placed..], &self.refused[refused..]),
            };
            match said.end(line) {
                Ok(line) => log.push(line),
                Err(_) => log.drop_line(),
            }
        } else {
            self.judged.take();
        }
        answer
    }

    /// The call's line as far as it is known before; None when it is not written.
    fn begin_line(&mut self, now: f64, input: &Input) -> Option<Vec<u8>> {
        match self.log.as_mut()?.need(now) {
            Need::Nothing => {}
            Need::Snapshot { file } => self.write_snapshot(now, file),
            Need::Drop => {
                self.log.as_mut()?.drop_line();
                return None;
            }
        }
        let mut line = br#"{"call":{"at":"#.to_vec();
        let written = serde_json::to_writer(&mut line, &now).and_then(|()| {
            line.extend(br#","in":"#);
            serde_json::to_writer(&mut line, input)
        });
        written.ok().map(|()| line)
    }

    fn write_snapshot(&mut self, now: f64, file: bool) {
        self.memo.clear();
        let key: String = self
            .chance
            .get_seed()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut workers: Vec<_> = self
            .workers
            .iter()
            .map(|(&id, name)| (id, name.clone()))
            .collect();
        workers.sort();
        let snapshot = Snapshot {
            at: now,
            chance: (key, self.chance.get_word_pos().to_string()),
            state: String::new(),
            workers,
            policies: self.policies.clone(),
        };
        if let (Ok(state), Some(log)) = (postcard::to_stdvec(&self.selector), &mut self.log) {
            log.snapshot(snapshot, state, file);
        }
    }

    fn apply(&mut self, now: f64, input: Input) -> Answer {
        let mut lookup = Noting {
            inner: &mut self.lookup,
            memo: self.log.is_some().then_some(&mut self.memo),
        };
        let context = &mut Context {
            now,
            lookup: &mut lookup,
            chance: &mut self.chance,
            placed: &mut self.placed,
            refused: &mut self.refused,
        };
        let selector = &mut self.selector;
        let known = |known: bool| if known { Answer::Done } else { Answer::Unknown };
        match input {
            Input::AddWorker { name, spec } => {
                let id = selector.add_worker(&spec);
                self.workers.insert(id, name);
                Answer::Worker(id)
            }
            Input::RemoveWorker { worker } => {
                self.workers.remove(&worker);
                selector.remove_worker(worker);
                Answer::Done
            }
            Input::Submit { request, .. } => match selector.submit(request, context) {
                Ok(()) => Answer::Done,
                Err(_) => Answer::NoWorker,
            },
            Input::Withdraw { request } => known(selector.withdraw(request)),
            Input::Adopt(adopted) => known(selector.adopt(adopted, context)),
            Input::Progress {
                lease,
                prefilled,
                output_tokens,
                transfer_ms,
            } => {
                let progress = Progress {
                    prefilled,
                    output_tokens,
                };
                known(selector.progress_moved(lease, progress, transfer_ms, context))
            }
            Input::End { lease } => known(selector.end(lease, context)),
            Input::Report { reports } => match selector.report(&reports, context) {
                unknown if unknown.is_empty() => Answer::Done,
                unknown => Answer::NotHeld(unknown),
            },
            Input::Tick => match selector.tick(context) {
                expired if expired.is_empty() => Answer::Done,
                expired => Answer::Expired(expired),
            },
            Input::Stored { worker, hashes } => {
                selector.stored(worker, &hashes);
                Answer::Done
            }
            Input::Removed { worker, hashes } => {
                selector.removed(now, worker, &hashes);
                Answer::Done
            }
            Input::Cleared { worker } => {
                selector.cleared(worker);
                Answer::Done
            }
            Input::AddPolicy { name } => {
                self.policies.push(name);
                Answer::Done
            }
            Input::Set(changes) => {
                self.apply_changes(now, &changes);
                Answer::Done
            }
        }
    }

    fn apply_changes(&mut self, now: f64, changes: &Changes) {
        if let Some(Ok(policy)) = changes.policy.as_deref().map(|name| self.policy(name)) {
            self.selector.set_policy(policy);
        }
        if let Some(temperature) = changes.temperature {
            self.selector.set_temperature(temperature);
        }
        if changes.max_held.is_some() || changes.max_wait_ms.is_some() {
            let bounds = &self.selector.config().admission;
            let max_held = changes.max_held.unwrap_or(bounds.max_held);
            let max_wait_ms = changes.max_wait_ms.unwrap_or(bounds.max_wait_ms);
            let context = &mut Context {
                now,
                lookup: &mut self.lookup,
                chance: &mut self.chance,
                placed: &mut self.placed,
                refused: &mut self.refused,
            };
            self.selector.set_bounds(max_held, max_wait_ms, context);
        }
    }
}

/// The rest of a line.
struct Said<'a> {
    found: Vec<(u32, Answered)>,
    judged: Vec<Vec<f64>>,
    answer: &'a Answer,
    out: Vec<Outcome>,
}

impl Said<'_> {
    /// Ends a line; what is empty is left out.
    fn end(self, mut line: Vec<u8>) -> serde_json::Result<Vec<u8>> {
        if !self.found.is_empty() {
            line.extend(br#","found":"#);
            serde_json::to_writer(&mut line, &self.found)?;
        }
        if !self.judged.is_empty() {
            line.extend(br#","judged":"#);
            serde_json::to_writer(&mut line, &self.judged)?;
        }
        if *self.answer != Answer::Done {
            line.extend(br#","answer":"#);
            serde_json::to_writer(&mut line, self.answer)?;
        }
        if !self.out.is_empty() {
            line.extend(br#","out":"#);
            serde_json::to_writer(&mut line, &self.out)?;
        }
        line.extend(b"}}\n");
        Ok(line)
    }
}
