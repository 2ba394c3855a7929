//! What engines were measured to take, and which engines they were.

use std::{fs, path::Path, rc::Rc};

use serde::Deserialize;
use serde_json::Value;

use crate::{
    Error, Result,
    cluster::Cluster,
    fit::{Args, Pairs},
    formats::{Record, first, lines, numbered, parse},
    job::Shape,
    timeline::Timeline,
    timing::Timing,
    trace::{Request, Trace},
};

/// Requests and what they took; all in order of arrival.
pub struct Measured {
    /// The requests.
    pub trace: Trace,
    /// Milliseconds to the first token.
    pub ttft_ms: Vec<f64>,
    /// Mean milliseconds between tokens; None for a single one.
    pub itl_ms: Vec<Option<f64>>,
}

/// A request with its times.
struct Line {
    arrival_ms: f64,
    prompt: u32,
    output: u32,
    chain: Rc<[u64]>,
    ttft_ms: f64,
    itl_ms: Option<f64>,
}

/// A line of LLMServingSim's `requests.jsonl`; seconds.
#[derive(Deserialize)]
struct Served {
    request_id: String,
    input_toks: u32,
    output_toks: u32,
    arrival_time: f64,
    queued_ts: f64,
    first_token_ts: f64,
    last_token_ts: f64,
}

/// A line of our own format.
#[derive(Deserialize)]
struct Plain {
    arrival_ms: f64,
    prompt_tokens: u32,
    #[serde(default)]
    cached_tokens: u32,
    output_tokens: u32,
    ttft_ms: f64,
    itl_ms: Option<Gaps>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Gaps {
    Mean(f64),
    All(Vec<f64>),
}

impl Gaps {
    fn mean(&self) -> Option<f64> {
        match self {
            Self::Mean(ms) => Some(*ms),
            Self::All(all) if all.is_empty() => None,
            Self::All(all) => Some(all.iter().sum::<f64>() / all.len() as f64),
        }
    }
}

impl Measured {
    /// Reads measurements, and what is known of the engines; given sizes come first.
    pub fn read(file: &Path, workload: Option<&Path>, given: &Args) -> Result<(Self, Cluster)> {
        let text = text(file)?;
        let engine = Engine::beside(file)?;
        let block_tokens = given.block_tokens.or(engine.block_tokens).unwrap_or(16);
        let workload = match workload {
            Some(path) => {
                Some(lines(&self::text(path)?, block_tokens).map_err(|e| e.in_file(path))?)
            }
            None => None,
        };
        let lines = read_lines(&text, workload.as_ref()).map_err(|error| error.in_file(file))?;
        let measured = Self::new(lines).map_err(|error| error.in_file(file))?;
        let max_running = given.max_running.or(engine.max_running).unwrap_or(256);
        let requests = measured.trace.requests.iter();
        let longest = requests
            .map(|r| r.prompt.saturating_add(r.output))
            .max()
            .unwrap_or(0);
        let enough = u64::from(longest.div_ceil(block_tokens.max(1)) + 1) * max_running as u64;
        let cluster = Cluster {
            aggregated: given.workers.or(engine.workers).unwrap_or(1),
            prefill: 0,
            decode: 0,
            shape: Shape {
                blocks: given
                    .blocks
                    .or(engine.blocks)
                    .unwrap_or(u32::try_from(enough).unwrap_or(u32::MAX)),
                block_tokens,
                pass_tokens: given.pass_tokens.or(engine.pass_tokens).unwrap_or(8192),
                max_running,
            },
            timing: Timing::default(),
            store: None,
            event_lag_ms: 0.0,
            slowdowns: Vec::new(),
        };
        Ok((measured, cluster))
    }

    fn new(mut lines: Vec<Line>) -> Result<Self> {
        lines.sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
        let start = lines.first().map_or(0.0, |line| line.arrival_ms);
        if let Some(bad) = lines
            .iter()
            .find(|line| !(line.ttft_ms > 0.0 && line.ttft_ms.is_finite()))
        {
            return Err(Error::invalid(format!(
                "a time of {} ms to the first token",
                bad.ttft_ms
            )));
        }
        let request = |line: &Line| Request {
            arrival_ms: line.arrival_ms - start,
            prompt: line.prompt.max(1),
            output: line.output.max(1),
            chain: line.chain.clone(),
            session: 0,
            delay_ms: None,
        };
        Ok(Self {
            trace: Trace::new(lines.iter().map(request).collect())?,
            ttft_ms: lines.iter().map(|line| line.ttft_ms).collect(),
            itl_ms: lines
                .iter()
                .map(|line| line.itl_ms.filter(|ms| *ms > 0.0 && line.output > 1))
                .collect(),
        })
    }

    /// Times to the first token of some requests: (measured, simulated).
    pub(super) fn ttft(&self, lives: &[Timeline], which: &[usize]) -> Pairs {
        let pair = |&at: &usize| (self.ttft_ms[at], lives[at].ttft());
        which.iter().map(pair).collect()
    }

    /// Times between tokens, of those that have any.
    pub(super) fn itl(&self, lives: &[Timeline], which: &[usize]) -> Pairs {
        let pair = |&at: &usize| Some((self.itl_ms[at]?, lives[at].itl()?));
        which.iter().filter_map(pair).collect()
    }
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::invalid(error.to_string()).in_file(path))
}

fn read_lines(text: &str, workload: Option<&Trace>) -> Result<Vec<Line>> {
    let keys = first(text)?;
    let has = |key: &str| keys.get(key).is_some();
    if has("first_token_ts") {
        served(text, workload)
    } else if has("metadata") {
        let each = numbered(text).map(|(number, line)| Ok(record(parse(number, line)?)));
        Ok(each
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .flatten()
            .collect())
    } else if has("ttft_ms") {
        numbered(text)
            .map(|(number, line)| Ok(plain(parse(number, line)?)))
            .collect()
    } else {
        Err(Error::invalid(
            "line 1: no known format: neither `first_token_ts` (LLMServingSim), nor `metadata` (aiperf's records), nor \
             `ttft_ms`",
        ))
    }
}

fn served(text: &str, workload: Option<&Trace>) -> Result<Vec<Line>> {
    let rows = numbered(text).map(|(number, line)| parse::<Served>(number, line));
    let rows = rows.collect::<Result<Vec<_>>>()?;
    // Arrivals are on another clock than what follows: the request that was queued fastest shows by how much.
    let behind = rows.iter().map(|row| row.queued_ts - row.arrival_time);
    let offset = behind.fold(f64::INFINITY, f64::min);
    let line = |row: &Served| {
        let at = row
            .request_id
            .rsplit('-')
            .next()
            .and_then(|number| number.parse::<usize>().ok());
        let wanted = at.and_then(|at| workload?.requests.get(at));
        let chain = wanted.filter(|wanted| wanted.prompt == row.input_toks);
        let gaps = f64::from(row.output_toks.saturating_sub(1));
        Line {
            arrival_ms: row.arrival_time * 1e3,
            prompt: row.input_toks,
            output: row.output_toks,
            chain: chain.map_or_else(|| Rc::from([]), |wanted| wanted.chain.clone()),
            ttft_ms: (row.first_token_ts - row.arrival_time - offset) * 1e3,
            itl_ms: (gaps > 0.0).then(|| (row.last_token_ts - row.first_token_ts) / gaps * 1e3),
        }
    };
    Ok(rows.iter().map(line).collect())
}

/// None for a request that failed.
fn record(record: Record) -> Option<Line> {
    let metrics = record.metrics?;
    let ttft_ms = metrics.time_to_first_token?.value;
    let output = metrics.output_sequence_length?.value;
    Some(Line {
        arrival_ms: record.metadata.request_start_ns / 1e6,
        prompt: metrics.input_sequence_length?.value as u32,
        output: output as u32,
        chain: Rc::from([]),
        ttft_ms,
        itl_ms: (output > 1.0)
            .then_some((metrics.request_latency?.value - ttft_ms) / (output - 1.0)),
    })
}

/// What was cached counts as not there: it takes no time, and whose blocks they were is not known.
fn plain(line: Plain) -> Line {
    Line {
        arrival_ms: line.arrival_ms,
        prompt: line.prompt_tokens.saturating_sub(line.cached_tokens),
        output: line.output_tokens,
        chain: Rc::from([]),
        ttft_ms: line.ttft_ms,
        itl_ms: line.itl_ms.and_then(|gaps| gaps.mean()),
    }
}

/// What `meta.json` says of the engines, as far as it does.
#[derive(Default)]
struct Engine {
    workers: Option<usize>,
    blocks: Option<u32>,
    block_tokens: Option<u32>,
    pass_tokens: Option<u32>,
    max_running: Option<usize>,
}

impl Engine {
    fn beside(file: &Path) -> Result<Self> {
        let path = file.with_file_name("meta.json");
        if !path.exists() {
            return Ok(Self::default());
        }
        let meta: Value = serde_json::from_str(&text(&path)?)
            .map_err(|error| Error::invalid(error.to_string()).in_file(&path))?;
        let number = |at: &str| meta.pointer(at).and_then(Value::as_u64);
        let small = |at: &str| number(at).and_then(|value| u32::try_from(value).ok());
        let count = |at: &str| number(at).map(|value| value as usize);
        Ok(Self {
            workers: count("/engine_kwargs/data_parallel_size"),
            blocks: small("/kv_cache/num_gpu_blocks"),
            block_tokens: small("/kv_cache/block_size"),
            pass_tokens: small("/engine_kwargs/max_num_batched_tokens"),
            max_running: count("/engine_kwargs/max_num_seqs"),
        })
    }
}
