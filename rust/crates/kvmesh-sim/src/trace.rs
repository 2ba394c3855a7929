//! Requests to simulate.

use std::rc::Rc;

use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

use crate::{Error, Result};

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Milliseconds since the start.
    pub arrival_ms: f64,
    /// Prompt tokens, at least 1.
    pub prompt: u32,
    /// Tokens to generate, at least 1.
    pub output: u32,
    /// Hashes of the prompt's whole blocks.
    pub chain: Rc<[u64]>,
    /// Requests of one session follow each other; 0: none.
    pub session: u64,
    /// It comes so long after the request before it in its session ended, whatever `arrival_ms` says, which is then but a
    /// lower bound.
    pub delay_ms: Option<f64>,
}

/// Requests in order of arrival.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In order of arrival.
    pub requests: Vec<Request>,
}

/// Spreads trace ids over 64 bits; the finaliser of MurmurHash3, a bijection. Never 0.
pub fn mix(id: u64) -> u64 {
    let mut x = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    (x ^ (x >> 33)).max(1)
}

impl Trace {
    /// Orders requests by arrival. Fails when there are none or a time is not one.
    pub fn new(mut requests: Vec<Request>) -> Result<Self> {
        if requests.is_empty() {
            return Err(Error::invalid("a trace without requests"));
        }
        let sane = |ms: f64| ms.is_finite() && ms >= 0.0;
        let bad = |r: &&Request| !sane(r.arrival_ms) || r.delay_ms.is_some_and(|ms| !sane(ms));
        if let Some(bad) = requests.iter().find(bad) {
            let (at, delay) = (bad.arrival_ms, bad.delay_ms);
            return Err(Error::invalid(format!(
                "an arrival at {at} ms, delayed {delay:?}"
            )));
        }
        requests.sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
        Ok(Self { requests })
    }

    /// Prompt tokens of all requests.
    pub fn prompt_tokens(&self) -> u64 {
        let tokens = self
            .requests
            .iter()
            .map(|request| u64::from(request.prompt));
        tokens.sum()
    }

    /// Adds up to `spread_ms` to every arrival, then divides all by `rate`. Delays within sessions stay.
    pub fn reshape(&mut self, spread_ms: f64, rate: f64, seed: u64) {
        let mut random = ChaCha8Rng::seed_from_u64(seed ^ 0x0005_97ea);
        let mut sessions: FxHashMap<u64, f64> = FxHashMap::default();
        for request in &mut self.requests {
            if request.delay_ms.is_some() {
                // Its time hangs on the one before.
                request.arrival_ms = sessions.get(&request.session).copied().unwrap_or_default();
                continue;
            }
            let late = if spread_ms > 0.0 {
                random.random_range(0.0..spread_ms)
            } else {
                0.0
            };
            request.arrival_ms = (request.arrival_ms + late) / rate;
            sessions.insert(request.session, request.arrival_ms);
        }
        self.requests
            .sort_by(|a, b| a.arrival_ms.total_cmp(&b.arrival_ms));
    }
}
