//! A selector as data: all that its next decision depends on.

use std::borrow::Cow;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    accuracy::Errors, config::Config, drain::Drain, eviction::Returns, held::Waitlist, line::Line,
    policy::PolicyName, rates::ClassRates, reports::Stream, selector::Selector, slots::Leases,
    speculation::Speculation, tail::Tail, worker::Worker,
};

/// Borrowed when a selector is saved, owned when one is made of it.
#[derive(Serialize, Deserialize)]
struct Saved<'a> {
    config: Cow<'a, Config>,
    workers: Cow<'a, [Option<Worker>]>,
    lives: u32,
    classes: Cow<'a, FxHashMap<String, usize>>,
    rates: Cow<'a, [ClassRates]>,
    leases: Cow<'a, Leases>,
    speculation: Cow<'a, Speculation>,
    returns: Cow<'a, Returns>,
    /// What policies remember.
    memories: Vec<(PolicyName, bool, u128)>,
    waitlist: Cow<'a, Waitlist>,
    line: Cow<'a, Line>,
    drain: Drain,
    gathering: Option<f64>,
    streams: Cow<'a, FxHashMap<u64, Stream>>,
    tail: Tail,
    errors: Errors,
}

/// Everything but shadows and the judgement of external policies. Where the format has infinities and exact floats (JSON has
/// not), the selector made of it decides as this one would.
impl Serialize for Selector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut memories: Vec<_> = self
            .policies
            .iter()
            .map(|(&(name, partners), policy)| (name, partners, policy.memory()))
            .filter(|(_, _, memory)| *memory != 0)
            .collect();
        memories.sort_unstable_by_key(|&(name, partners, _)| (name.name(), partners));
        Saved {
            config: Cow::Borrowed(&self.config),
            workers: Cow::Borrowed(&self.workers),
            lives: self.lives,
            classes: Cow::Borrowed(&self.classes),
            rates: Cow::Borrowed(&self.rates),
            leases: Cow::Borrowed(&self.leases),
            speculation: Cow::Borrowed(&self.speculation),
            returns: Cow::Borrowed(&self.returns),
            memories,
            waitlist: Cow::Borrowed(&self.waitlist),
            line: Cow::Borrowed(&self.line),
            drain: self.drain,
            gathering: self.gathering,
            streams: Cow::Borrowed(&self.streams),
            tail: self.tail,
            errors: self.errors,
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let saved = Saved::deserialize(deserializer)?;
        let mut selector = Self::new(saved.config.into_owned());
        for (name, partners, memory) in saved.memories {
            let mut policy = name.make();
            policy.recall(memory);
            selector.policies.insert((name, partners), policy);
        }
        selector.workers = saved.workers.into_owned();
        selector.lives = saved.lives;
        selector.classes = saved.classes.into_owned();
        selector.rates = saved.rates.into_owned();
        selector.leases = saved.leases.into_owned();
        selector.speculation = saved.speculation.into_owned();
        selector.returns = saved.returns.into_owned();
        selector.waitlist = saved.waitlist.into_owned();
        selector.line = saved.line.into_owned();
        selector.drain = saved.drain;
        selector.gathering = saved.gathering;
        selector.streams = saved.streams.into_owned();
        selector.tail = saved.tail;
        selector.errors = saved.errors;
        Ok(selector)
    }
}

/// Block hashes: hex where people read them, 16 digits each; numbers elsewhere.
pub mod hashes {
    use std::fmt::Write;

    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    /// Writes them.
    pub fn serialize<S: Serializer>(hashes: &[u64], serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return hashes.serialize(serializer);
        }
        let mut text = String::with_capacity(16 * hashes.len());
        for hash in hashes {
            let _ = write!(text, "{hash:016x}");
        }
        serializer.serialize_str(&text)
    }

    /// Reads them. Fails where digits are missing or none.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<[u64]>, D::Error> {
        if !deserializer.is_human_readable() {
            return Box::deserialize(deserializer);
        }
        let text = String::deserialize(deserializer)?;
        let wrong = || D::Error::custom("hashes are hexadecimal, 16 digits each");
        if text.len() % 16 != 0 || !text.is_ascii() {
            return Err(wrong());
        }
        (0..text.len() / 16)
            .map(|at| u64::from_str_radix(&text[16 * at..16 * (at + 1)], 16).map_err(|_| wrong()))
            .collect()
    }
}
