//! The reading side: the same calls again, compared with what came of them; and what others would have chosen.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use kvmesh_select::{GivenRates, PolicyName, Selector, Shadow, WorkerId};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::Serialize;

use crate::{
    driver::Driver,
    error::{ReplayError, Result},
    files::{self, LogFile},
    input::{Answer, Input},
    line::{Call, Head, Line, Outcome, Placement, Snapshot, VERSION},
    lookups::Recorded,
    regret::Tally,
    witness::Quoted,
};

/// What else is asked at every decision.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A policy of ours; None: each request's own.
    pub policy: Option<String>,
    /// Rates to judge by in place of those learned.
    pub rates: Option<GivenRates>,
}

/// A decision that came out otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The file, and the line in it.
    pub file: PathBuf,
    /// From 1 on.
    pub line: usize,
    /// What was logged.
    pub logged: String,
    /// What came out.
    pub replayed: String,
}

/// What one model's log says.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// Files read.
    pub files: u64,
    /// Calls made again.
    pub calls: u64,
    /// Placements made again.
    pub decisions: u64,
    /// Of these, as they were.
    pub same: u64,
    /// Requests refused again.
    pub refusals: u64,
    /// The first decisions that came out otherwise; after one the replay goes on from the next snapshot.
    pub differences: Vec<Difference>,
    /// Lines that were not written, as the log says.
    pub missing: u64,
    /// Calls that could not be made again: after something missing or different, and before the next snapshot.
    pub skipped: u64,
    /// Changes at run time: when (seconds since the epoch), by whom, and of what.
    pub changes: Vec<(f64, crate::Changes)>,
    /// What other policies would have done.
    pub others: Vec<Tally>,
}

/// Differences that a report keeps.
const MOST_DIFFERENCES: usize = 20;

/// Replays a file, or every log of a directory, model by model.
pub fn replay(path: &Path, options: &Options) -> Result<Vec<Report>> {
    let io = |why| ReplayError::Io {
        path: path.to_owned(),
        why,
    };
    let shadow = options.shadow()?;
    let found = match path.is_dir() {
        true => files::list(path).map_err(io)?,
        false => files::parse(path).into_iter().collect(),
    };
    let mut logs: BTreeMap<String, Vec<LogFile>> = BTreeMap::new();
    for file in found {
        logs.entry(file.name.clone()).or_default().push(file);
    }
    if logs.is_empty() {
        return Err(ReplayError::Nothing(path.to_owned()));
    }
    let reports = logs.into_values().map(|files| {
        let mut reader = Reader {
            shadow,
            options,
            driver: None,
            head: None,
            number: 0,
            report: Report::default(),
            others: BTreeMap::new(),
            policies: Vec::new(),
        };
        for file in &files {
            reader.read(file)?;
        }
        Ok(reader.finish())
    });
    reports.collect()
}

impl Options {
    /// The policy that is asked, where one is: None is each request's own.
    fn shadow(&self) -> Result<Option<Option<PolicyName>>> {
        let policy = self.policy.as_deref().map(str::parse::<PolicyName>);
        let policy = policy
            .transpose()
            .map_err(|error| ReplayError::Policy(error.to_string()))?;
        Ok((policy.is_some() || self.rates.is_some()).then_some(policy))
    }
}

struct Reader<'a> {
    shadow: Option<Option<PolicyName>>,
    options: &'a Options,
    /// None where it is not known what state things were in.
    driver: Option<Driver<Recorded>>,
    head: Option<Head>,
    /// Of the last file.
    number: u64,
    report: Report,
    /// By name; those that were asked here, and those whose choices were logged.
    others: BTreeMap<String, Tally>,
    policies: Vec<String>,
}

impl Reader<'_> {
    fn read(&mut self, file: &LogFile) -> Result<()> {
        let io = |why| ReplayError::Io {
            path: file.path.clone(),
            why,
        };
        let mut lines = BufReader::new(File::open(&file.path).map_err(io)?);
        if file.number != self.number + 1 {
            self.driver = None;
        }
        self.number = file.number;
        self.report.files += 1;
        let mut text = Vec::new();
        for number in 1.. {
            text.clear();
            lines.read_until(b'\n', &mut text).map_err(io)?;
            let wrong = |why: String| ReplayError::Line {
                path: file.path.clone(),
                line: number,
                why,
            };
            match text.pop() {
                Some(b'\n') => {}
                // The end; or a line that its router did not come to write whole.
                _ => return Ok(()),
            }
            let line = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
            match line {
                Line::Head(head) => self.begin(head).map_err(wrong)?,
                Line::Gap(gap) => {
                    self.report.missing += gap.lines;
                    self.driver = None;
                }
                Line::Snapshot(snapshot) => self.restore(snapshot).map_err(wrong)?,
                Line::Call(call) => self.make(call, &file.path, number),
            }
        }
        Ok(())
    }

    fn begin(&mut self, head: Head) -> std::result::Result<(), String> {
        if head.version != VERSION {
            let version = head.version;
            return Err(format!(
                "a log of version {version}, this is version {VERSION}; replay it with the kvmesh that wrote it"
            ));
        }
        if self.head.as_ref().is_none_or(|last| last.run != head.run) {
            self.driver = None;
        }
        self.report.model.clone_from(&head.model);
        self.head = Some(head);
        Ok(())
    }

    fn restore(&mut self, snapshot: Snapshot) -> std::result::Result<(), String> {
        if let Some(driver) = &mut self.driver {
            // What was looked up is written anew after a snapshot.
            driver.lookup = Recorded::default();
            return Ok(());
        }
        let state = STANDARD
            .decode(&snapshot.state)
            .map_err(|e| e.to_string())?;
        let selector: Selector = postcard::from_bytes(&state).map_err(|e| e.to_string())?;
        let chance = chance(&snapshot.chance).ok_or("the source of chance is unreadable")?;
        let mut driver = Driver::with(selector, Recorded::default(), chance);
        for number in 0..snapshot.policies.len() {
            quote(&mut driver, number as u16);
        }
        self.policies.clone_from(&snapshot.policies);
        driver.set_names(snapshot.policies, snapshot.workers);
        if let Some(policy) = self.shadow {
            let rates = self.options.rates.clone().unwrap_or_default();
            let shadow = Shadow::new(policy).with_rates(rates);
            driver.selector_mut().set_shadows(vec![shadow]);
        }
        self.driver = Some(driver);
        Ok(())
    }

    fn make(&mut self, call: Call, path: &Path, line: usize) {
        let Some(driver) = &mut self.driver else {
            self.report.skipped += 1;
            return;
        };
        if let Input::AddPolicy { .. } = &call.input {
            quote(driver, driver.policies().len() as u16);
        }
        if let Input::Set(changes) = &call.input {
            let epoch = self.head.as_ref().map_or(0.0, |head| head.epoch);
            let at = epoch + call.at / 1000.0;
            self.report.changes.push((at, changes.clone()));
        }
        driver.lookup.begin(call.found);
        driver.judged().begin(call.judged);
        let answer = driver.call(call.at, call.input);
        let out = Outcome::of(&driver.placed, &driver.refused);
        driver.placed.clear();
        driver.refused.clear();
        self.report.calls += 1;
        let names = driver.worker_names();
        let name = |id: WorkerId| {
            names
                .get(&id)
                .cloned()
                .unwrap_or_else(|| id.raw().to_string())
        };
        let placements = |all: &[Outcome]| -> Vec<Placement> {
            let placed = all.iter().filter_map(|one| match one {
                Outcome::Placed(placement) => Some(placement.clone()),
                Outcome::Refused(_) => None,
            });
            placed.collect()
        };
        for (outcomes, asked_here) in [(&call.out, false), (&out, true)] {
            for placed in placements(outcomes) {
                for shadow in &placed.shadows {
                    let policy = policy_name(shadow.policy, &self.policies);
                    let policy = match (asked_here, &self.options.rates) {
                        (true, Some(_)) => format!("{policy} by the rates given"),
                        (true, None) => policy,
                        (false, _) => format!("{policy} in the log"),
                    };
                    let tally = self.others.entry(policy);
                    tally
                        .or_insert_with_key(|policy| Tally::new(policy.clone()))
                        .add(&placed.winner, shadow);
                }
            }
        }
        let logged: Vec<Outcome> = call.out.into_iter().map(Outcome::bare).collect();
        let made: Vec<Outcome> = out.into_iter().map(Outcome::bare).collect();
        self.report.decisions += placements(&logged).len() as u64;
        let refused = logged.len() - placements(&logged).len();
        self.report.refusals += refused as u64;
        if logged == made && answer == call.answer && !driver.lookup.lost {
            self.report.same += placements(&logged).len() as u64;
            return;
        }
        if self.report.differences.len() < MOST_DIFFERENCES {
            self.report.differences.push(Difference {
                file: path.to_owned(),
                line,
                logged: said(&logged, &call.answer, name),
                replayed: said(&made, &answer, name),
            });
        }
        self.driver = None;
    }

    fn finish(mut self) -> Report {
        self.report.others = self.others.into_values().map(Tally::finish).collect();
        self.report
    }
}

fn quote(driver: &mut Driver<Recorded>, number: u16) {
    let quoted = || Box::new(Quoted(driver.judged().clone()));
    let (judge, partners) = (quoted(), quoted());
    driver.selector_mut().add_policy(number, judge, partners);
}

fn chance((key, position): &(String, String)) -> Option<ChaCha8Rng> {
    let mut seed = [0; 32];
    if key.len() != 64 || !key.is_ascii() {
        return None;
    }
    for (at, byte) in seed.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&key[2 * at..2 * at + 2], 16).ok()?;
    }
    let mut chance = ChaCha8Rng::from_seed(seed);
    chance.set_word_pos(position.parse().ok()?);
    Some(chance)
}

fn policy_name(policy: PolicyName, external: &[String]) -> String {
    match policy {
        PolicyName::External(number) => external
            .get(usize::from(number))
            .cloned()
            .unwrap_or_else(|| policy.to_string()),
        _ => policy.to_string(),
    }
}

fn said(all: &[Outcome], answer: &Answer, name: impl Fn(WorkerId) -> String) -> String {
    let mut parts: Vec<String> = all
        .iter()
        .map(|one| match one {
            Outcome::Placed(placement) => {
                let winner = &placement.winner;
                let cost: f64 = winner.terms.iter().sum();
                let (prefill, decode) = (name(winner.prefill), name(winner.decode));
                let request = placement.request;
                format!("request {request} on {prefill} and {decode} for {cost} ms")
            }
            Outcome::Refused(refusal) => {
                format!("request {} refused: {}", refusal.request, refusal.reason)
            }
        })
        .collect();
    if *answer != Answer::Done {
        parts.push(format!("{answer:?}"));
    }
    parts.join("; ")
}
