//! The formats that traces come in: one JSON object a line, or Azure's CSV.
//!
//! | format | fields |
//! |---|---|
//! | Mooncake | `timestamp` ms, `input_length`, `output_length`, `hash_ids`: one id a block, equal ids being equal prefixes |
//! | aiperf's trace | the same; also `session_id`, and `delay` ms after the session's request before, in place of `timestamp` |
//! | aiperf's records (`profile_export.jsonl`) | `metadata.request_start_ns`, lengths in `metrics` |
//! | LLMServingSim's workload | `arrival_time_ns`, `input_toks`, `output_toks`, `input_tok_ids` |
//! | Azure (CSV) | `TIMESTAMP,ContextTokens,GeneratedTokens` |

use std::{fs, hash::Hasher, path::Path, rc::Rc};

use rustc_hash::{FxHashMap, FxHasher};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    Error, Result,
    trace::{Request, Trace, mix},
};

#[derive(Deserialize)]
struct TraceLine {
    timestamp: Option<f64>,
    delay: Option<f64>,
    input_length: u32,
    output_length: u32,
    #[serde(default)]
    hash_ids: Vec<u64>,
    session_id: Option<String>,
}

/// A line of aiperf's `profile_export.jsonl`.
#[derive(Deserialize)]
pub(crate) struct Record {
    pub metadata: Metadata,
    pub metrics: Option<Metrics>,
}

#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub request_start_ns: f64,
    pub conversation_id: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct Metrics {
    pub input_sequence_length: Option<Metric>,
    pub output_sequence_length: Option<Metric>,
    pub time_to_first_token: Option<Metric>,
    pub request_latency: Option<Metric>,
}

/// Milliseconds or tokens, as aiperf writes these metrics.
#[derive(Clone, Copy, Deserialize)]
pub(crate) struct Metric {
    pub value: f64,
}

#[derive(Deserialize)]
struct WorkloadLine {
    arrival_time_ns: f64,
    input_toks: u32,
    output_toks: u32,
    #[serde(default)]
    input_tok_ids: Vec<u32>,
}

/// Reads a trace file: `.csv` in Azure's format, else JSON lines. Errors name the file.
pub fn read(path: &Path, block_tokens: u32) -> Result<Trace> {
    let text = fs::read_to_string(path)
        .map_err(|error| Error::invalid(error.to_string()).in_file(path))?;
    let trace = match path.extension().and_then(|ext| ext.to_str()) {
        Some("csv") => azure(&text),
        _ => lines(&text, block_tokens),
    };
    trace.map_err(|error| error.in_file(path))
}

/// Lines that are not empty, with their numbers from 0 on.
pub(crate) fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines = text.lines().enumerate();
    lines.filter(|(_, line)| !line.trim().is_empty())
}

/// The fields of a file's first line.
pub(crate) fn first(text: &str) -> Result<Value> {
    match numbered(text).next() {
        Some((number, line)) => {
            serde_json::from_str(line).map_err(|error| Error::at_line(number, error))
        }
        None => Err(Error::invalid("an empty file")),
    }
}

pub(crate) fn parse<T: DeserializeOwned>(number: usize, line: &str) -> Result<T> {
    serde_json::from_str(line).map_err(|error| Error::at_line(number, error))
}

/// Parses JSON lines; the first one says in which format all are.
pub fn lines(text: &str, block_tokens: u32) -> Result<Trace> {
    let first = first(text)?;
    if first.get("input_length").is_some() {
        trace_lines(text, block_tokens)
    } else if first.get("metadata").is_some() {
        records(text)
    } else if first.get("input_toks").is_some() {
        workload(text, block_tokens)
    } else if ["text", "texts", "turns", "messages", "prompt"]
        .iter()
        .any(|key| first.get(key).is_some())
    {
        Err(Error::invalid(
            "line 1: prompts as text, which have no length without a tokenizer; give aiperf's mooncake_trace, or \
             the profile_export.jsonl of a run",
        ))
    } else {
        Err(Error::invalid(
            "line 1: no known format: neither `input_length` (Mooncake, aiperf), nor `metadata` (aiperf's records), \
             nor `input_toks` (LLMServingSim)",
        ))
    }
}

/// What a session's next request continues.
#[derive(Default)]
struct Context {
    tokens: u32,
    arrival_ms: f64,
}

fn trace_lines(text: &str, block_tokens: u32) -> Result<Trace> {
    let mut requests = Vec::new();
    let mut sessions: FxHashMap<u64, Context> = FxHashMap::default();
    for (number, line) in numbered(text) {
        let line: TraceLine = parse(number, line)?;
        let session = line.session_id.as_deref().map_or(0, name);
        let before = sessions.entry(session).or_default();
        let continues = session != 0 && before.tokens > 0;
        let (arrival_ms, delay_ms) = match (line.timestamp, line.delay) {
            (Some(at), _) => (at, None),
            (None, Some(delay)) if continues => (before.arrival_ms, Some(delay)),
            (None, _) => (0.0, None),
        };
        let mut prompt = line.input_length.max(1);
        let chain: Rc<[u64]> = if line.hash_ids.is_empty() && session != 0 {
            // Such a line holds what the turn adds to the conversation.
            prompt = prompt.saturating_add(before.tokens);
            (0..prompt / block_tokens)
                .map(|block| mix(session ^ mix(u64::from(block))))
                .collect()
        } else {
            // The last id may stand for a block that is not full: nobody can share it.
            let whole = (prompt / block_tokens) as usize;
            let ids = &line.hash_ids[..whole.min(line.hash_ids.len())];
            ids.iter().map(|&id| mix(id)).collect()
        };
        let output = line.output_length.max(1);
        if session != 0 {
            *before = Context {
                tokens: prompt.saturating_add(output),
                arrival_ms,
            };
        }
        requests.push(Request {
            arrival_ms,
            prompt,
            output,
            chain,
            session,
            delay_ms,
        });
    }
    Trace::new(requests)
}

fn records(text: &str) -> Result<Trace> {
    let mut requests = Vec::new();
    for (number, line) in numbered(text) {
        let Record { metadata, metrics } = parse(number, line)?;
        // Without lengths it failed or was cancelled.
        let Some((prompt, output)) = metrics.and_then(|metrics| {
            let (input, output) = (
                metrics.input_sequence_length?,
                metrics.output_sequence_length?,
            );
            Some((input.value as u32, output.value as u32))
        }) else {
            continue;
        };
        requests.push(Request {
            arrival_ms: metadata.request_start_ns / 1e6,
            prompt: prompt.max(1),
            output: output.max(1),
            chain: Rc::from([]),
            session: metadata.conversation_id.as_deref().map_or(0, name),
            delay_ms: None,
        });
    }
    from_zero(requests)
}

fn workload(text: &str, block_tokens: u32) -> Result<Trace> {
    let mut requests = Vec::new();
    for (number, line) in numbered(text) {
        let line: WorkloadLine = parse(number, line)?;
        requests.push(Request {
            arrival_ms: line.arrival_time_ns / 1e6,
            prompt: line.input_toks.max(1),
            output: line.output_toks.max(1),
            chain: chain(&line.input_tok_ids, block_tokens),
            session: 0,
            delay_ms: None,
        });
    }
    from_zero(requests)
}

/// Names of whole blocks, each of all tokens up to its end.
fn chain(tokens: &[u32], block_tokens: u32) -> Rc<[u64]> {
    let mut before = 0;
    let blocks = tokens.chunks_exact(block_tokens as usize).map(|block| {
        let mut hasher = FxHasher::default();
        hasher.write_u64(before);
        block.iter().for_each(|&token| hasher.write_u32(token));
        before = mix(hasher.finish());
        before
    });
    blocks.collect()
}

/// A number for a name; never 0.
fn name(text: &str) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(text.as_bytes());
    mix(hasher.finish())
}

fn from_zero(mut requests: Vec<Request>) -> Result<Trace> {
    let times = requests.iter().map(|request| request.arrival_ms);
    let first = times.fold(f64::INFINITY, f64::min);
    for request in &mut requests {
        request.arrival_ms -= first;
    }
    Trace::new(requests)
}

/// Parses Azure's format, which knows no prefixes.
pub fn azure(text: &str) -> Result<Trace> {
    let mut requests = Vec::new();
    for (number, line) in numbered(text).skip(1) {
        let request = azure_line(line).ok_or_else(|| {
            Error::at_line(number, format!("not TIMESTAMP,TOKENS,TOKENS: `{line}`"))
        })?;
        requests.push(request);
    }
    from_zero(requests)
}

/// `2023-11-16 18:15:46.6805900,374,44`; milliseconds since 1 March of the year 0, as the proleptic calendar counts.
fn azure_line(line: &str) -> Option<Request> {
    let mut fields = line.trim().split(',');
    let (date, time) = fields.next()?.split_once(' ')?;
    let prompt: u32 = fields.next()?.trim().parse().ok()?;
    let output: u32 = fields.next()?.trim().parse().ok()?;
    let mut parts = date.split('-').map(str::parse::<u32>);
    let (year, month, day) = (
        parts.next()?.ok()?,
        parts.next()?.ok()?,
        parts.next()?.ok()?,
    );
    // Newer traces name their zone, which is always the same.
    let mut clock = time.split('+').next()?.split(':').map(str::parse::<f64>);
    let (hour, minute, second) = (
        clock.next()?.ok()?,
        clock.next()?.ok()?,
        clock.next()?.ok()?,
    );
    let hours = f64::from(days(year, month, day)?) * 24.0 + hour;
    Some(Request {
        arrival_ms: ((hours * 60.0 + minute) * 60.0 + second) * 1e3,
        prompt: prompt.max(1),
        output: output.max(1),
        chain: Rc::from([]),
        session: 0,
        delay_ms: None,
    })
}

/// Days of a date since 1 March of the year 0; months from March on are 153 days in every five.
fn days(year: u32, month: u32, day: u32) -> Option<u32> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || year == 0 {
        return None;
    }
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    Some(365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1)
}
