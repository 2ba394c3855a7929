//! How long work takes: of a hardware class, learned from all its workers, and of one worker in it.

use rustc_hash::FxHashMap;

use crate::fit::{Fit, Quality};

/// What an engine measured of itself at start. Each entry is one measurement; empty is allowed.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Probe {
    /// (prompt tokens of one pass, tokens before them in the context, ms).
    pub prefill: Vec<(u32, u32, f64)>,
    /// (streams, share of the KV pool in use, ms between tokens).
    pub decode: Vec<(u32, f64, f64)>,
    /// (tokens, ms) of KV moved from a prefill worker.
    pub transfer: Vec<(u32, f64)>,
}

/// Prompt tokens to compute, pass by pass, as the features of the prefill law.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Work {
    /// Passes; tokens; sum of each pass' tokens squared; sum of tokens times the tokens before their pass.
    pub features: [f64; 4],
}

impl Work {
    /// Computing `tokens` that follow `before` others in the context, at most `pass_tokens` at once.
    pub fn of(tokens: u32, before: u32, pass_tokens: u32) -> Self {
        let (whole, rest) = (tokens / pass_tokens, tokens % pass_tokens);
        let (k, c, r) = (f64::from(whole), f64::from(pass_tokens), f64::from(rest));
        let b = f64::from(before);
        // Pass i begins after b + i c tokens.
        let reach = c * (k * b + c * k * (k - 1.0).max(0.0) / 2.0) + r * (b + k * c);
        let passes = k + if rest > 0 { 1.0 } else { 0.0 };
        Self {
            features: [passes, f64::from(tokens), k * c * c + r * r, reach],
        }
    }

    /// This and another one, pass after pass.
    pub fn and(&self, other: &Work) -> Self {
        Self {
            features: std::array::from_fn(|i| self.features[i] + other.features[i]),
        }
    }

    /// Passes it takes.
    pub fn passes(&self) -> f64 {
        self.features[0]
    }
}

/// The rates of one hardware class, milliseconds.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ClassRates {
    /// A pass, a token, its quadratic part within the pass, and by position in the context.
    prefill: Fit<4>,
    /// Between tokens: constant, a stream, the pool full.
    decode: Fit<3>,
    /// Receiving KV from another worker: constant, a token.
    transfer: Fit<2>,
    /// A token's KV from host, nvme, network.
    tiers: Fit<3>,
}

// Starting points of the order a mid-range accelerator shows with a model of some 8 B parameters; a probe or the first
// requests replace them.
const PREFILL: [f64; 4] = [15.0, 0.05, 5e-7, 5e-8];
const DECODE: [f64; 3] = [8.0, 0.05, 30.0];
const TRANSFER: [f64; 2] = [1.0, 0.004];
const TIERS: [f64; 3] = [0.005, 0.02, 0.02];

const PREFILL_NAMES: [&str; 4] = ["pass", "token", "token_squared", "token_by_position"];
const DECODE_NAMES: [&str; 3] = ["step", "stream", "pool_full"];
const TRANSFER_NAMES: [&str; 2] = ["request", "token"];
const TIER_NAMES: [&str; 3] = ["host_token", "nvme_token", "network_token"];

/// One law of a class' rates, for those who look.
#[derive(Clone, Debug, PartialEq)]
pub struct Law {
    /// prefill, decode, transfer or onboard.
    pub name: &'static str,
    /// What each unit of work takes, in milliseconds.
    pub coefficients: Vec<(&'static str, f64)>,
    /// How well it holds.
    pub quality: Quality,
}

impl Law {
    fn of<const N: usize>(name: &'static str, names: &[&'static str; N], fit: &Fit<N>) -> Self {
        Self {
            name,
            coefficients: names.iter().copied().zip(*fit.coefficients()).collect(),
            quality: fit.quality(),
        }
    }
}

impl Default for ClassRates {
    fn default() -> Self {
        Self {
            prefill: Fit::new(PREFILL, [1.0, 1e-3, 1e-7, 1e-8]),
            decode: Fit::new(DECODE, [1.0, 1e-2, 1.0]),
            transfer: Fit::new(TRANSFER, [0.1, 1e-4]),
            tiers: Fit::new(TIERS, [1e-4; 3]),
        }
    }
}

impl ClassRates {
    /// Takes a worker's probe in, law by law, since prefill and decode engines measure different ones: where a law is
    /// still the guess, measurements replace it; where anything is known, they are observations as others are.
    pub fn probe(&mut self, probe: &Probe, pass_tokens: u32) {
        fn learn<const N: usize>(
            fit: &mut Fit<N>,
            guess: &Fit<N>,
            points: impl ExactSizeIterator<Item = ([f64; N], f64)>,
        ) {
            if points.len() > 0 && fit == guess {
                fit.measured(points);
            } else {
                points.for_each(|(features, ms)| fit.observe(&features, ms));
            }
        }
        let guess = Self::default();
        let prefill = probe
            .prefill
            .iter()
            .map(|&(tokens, before, ms)| (Work::of(tokens, before, pass_tokens).features, ms));
        let decode = probe
            .decode
            .iter()
            .map(|&(streams, share, ms)| ([1.0, f64::from(streams), share], ms));
        let transfer = probe
            .transfer
            .iter()
            .map(|&(tokens, ms)| ([1.0, f64::from(tokens)], ms));
        learn(&mut self.prefill, &guess.prefill, prefill);
        learn(&mut self.decode, &guess.decode, decode);
        learn(&mut self.transfer, &guess.transfer, transfer);
    }

    /// What is known: each law's name, its coefficients by name (ms), and how well it holds.
    pub fn laws(&self) -> [Law; 4] {
        [
            Law::of("prefill", &PREFILL_NAMES, &self.prefill),
            Law::of("decode", &DECODE_NAMES, &self.decode),
            Law::of("transfer", &TRANSFER_NAMES, &self.transfer),
            Law::of("onboard", &TIER_NAMES, &self.tiers),
        ]
    }

    /// Takes coefficients by law and name over, as [`ClassRates::laws`] gives them; what is not named stays.
    pub fn give(&mut self, laws: &FxHashMap<String, FxHashMap<String, f64>>) {
        fn over<const N: usize>(
            fit: &mut Fit<N>,
            names: &[&str; N],
            given: Option<&FxHashMap<String, f64>>,
        ) {
            if let Some(given) = given {
                let now = *fit.coefficients();
                let value = |at: usize| given.get(names[at]).copied().unwrap_or(now[at]);
                *fit = fit.starting_at(std::array::from_fn(value));
            }
        }
        over(&mut self.prefill, &PREFILL_NAMES, laws.get("prefill"));
        over(&mut self.decode, &DECODE_NAMES, laws.get("decode"));
        over(&mut self.transfer, &TRANSFER_NAMES, laws.get("transfer"));
        over(&mut self.tiers, &TIER_NAMES, laws.get("onboard"));
    }

    /// Computing a prompt on an engine that does nothing else.
    pub fn prefill_ms(&self, work: &Work) -> f64 {
        self.prefill.predict(&work.features)
    }

    /// A pass with a prompt in it, before any token.
    pub fn prefill_pass_ms(&self) -> f64 {
        self.prefill.coefficients()[0]
    }

    /// One token more of a prompt, at the margin.
    pub fn prefill_token_ms(&self) -> f64 {
        self.prefill.coefficients()[1]
    }

    /// Between tokens, with this many streams and share of the pool in use.
    pub fn decode_ms(&self, streams: u32, share: f64) -> f64 {
        self.decode.predict(&[1.0, f64::from(streams), share])
    }

    /// Receiving the KV of `tokens`.
    pub fn transfer_ms(&self, tokens: u32) -> f64 {
        self.transfer.predict(&[1.0, f64::from(tokens)])
    }

    /// Onboarding tokens from host, nvme and network.
    pub fn onboard_ms(&self, tokens: [u32; 3]) -> f64 {
        self.tiers.predict(&tokens.map(f64::from))
    }

    /// Learns that a prompt took this long; `decode` and `onboard` are parts of it known from elsewhere.
    pub fn observe_prefill(&mut self, work: &Work, ms: f64) {
        self.prefill.observe(&work.features, ms);
    }

    /// Learns a time between tokens.
    pub fn observe_decode(&mut self, streams: f64, share: f64, ms: f64) {
        self.decode.observe(&[1.0, streams, share], ms);
    }

    /// Learns a transfer's time.
    pub fn observe_transfer(&mut self, tokens: u32, ms: f64) {
        self.transfer.observe(&[1.0, f64::from(tokens)], ms);
    }

    /// Learns what onboarding took.
    pub fn observe_onboard(&mut self, tokens: [u32; 3], ms: f64) {
        self.tiers.observe(&tokens.map(f64::from), ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted_pass_by_pass() {
        // 10,000 tokens after 1,000, at most 4,000 a pass: 4,000 after 1,000, 4,000 after 5,000, 2,000 after 9,000.
        let work = Work::of(10_000, 1_000, 4_000);
        let squares = 2.0 * 4_000.0_f64.powi(2) + 2_000.0_f64.powi(2);
        let reach = 4_000.0 * 1_000.0 + 4_000.0 * 5_000.0 + 2_000.0 * 9_000.0;
        assert_eq!(work.features, [3.0, 10_000.0, squares, reach]);
        assert_eq!(Work::of(0, 0, 4_000).features, [0.0; 4]);
    }

    #[test]
    fn a_probe_replaces_the_guess() {
        let mut rates = ClassRates::default();
        let law = |n: f64| 16.5 + 0.015183 * n + 4.21e-7 * n * n;
        let sizes = [256, 1024, 4096, 8192];
        let prefill = sizes.map(|n| (n, 0, law(f64::from(n)))).to_vec();
        rates.probe(
            &Probe {
                prefill,
                ..Probe::default()
            },
            8192,
        );
        for n in [512, 2048, 8192] {
            let predicted = rates.prefill_ms(&Work::of(n, 0, 8192));
            assert!(
                (predicted / law(f64::from(n)) - 1.0).abs() < 0.05,
                "{n}: {predicted}"
            );
        }
    }

    #[test]
    fn the_halves_of_a_class_probe_what_they_do() {
        let mut rates = ClassRates::default();
        let of = |prefill, decode| Probe {
            prefill,
            decode,
            ..Probe::default()
        };
        let decode = vec![(1, 0.0, 60.0), (8, 0.0, 95.0)];
        rates.probe(&of(vec![], decode.clone()), 512);
        assert!((rates.decode_ms(8, 0.0) / 95.0 - 1.0).abs() < 0.05);
        let prefill = vec![(64, 0, 150.0), (256, 0, 510.0)];
        rates.probe(&of(prefill, vec![]), 512);
        assert!((rates.prefill_ms(&Work::of(128, 0, 512)) / 270.0 - 1.0).abs() < 0.05);
        assert!((rates.decode_ms(8, 0.0) / 95.0 - 1.0).abs() < 0.05);
        // A second worker, which was disturbed while it measured, is heard as one of two.
        let disturbed = decode.iter().map(|&(n, share, ms)| (n, share, 3.0 * ms));
        rates.probe(&of(vec![], disturbed.collect()), 512);
        let pooled = rates.decode_ms(8, 0.0);
        assert!((95.0..2.0 * 95.0).contains(&pooled), "{pooled}");
    }
}
