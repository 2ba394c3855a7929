//! How long an engine's work takes.

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The polynomial timing model: one forward pass over `n` prompt tokens beside running streams takes
/// `prefill(n) + decode(p)` milliseconds, `p` being the share of the pool's blocks in use.
///
/// The default coefficients are those NVIDIA Dynamo's mocker (1.6.1) uses, fitted by its authors to one
/// H200; terms that grow with the position in the context and with the number of streams can be added for engines that
/// show them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timing {
    /// Milliseconds: a pass with prefill, a token, a token squared.
    pub prefill: [f64; 3],
    /// Milliseconds per token and token before it in the context.
    #[serde(default)]
    pub context: f64,
    /// Milliseconds of the streams' part of a pass: constant, by p, by p squared.
    pub decode: [f64; 3],
    /// Milliseconds of a pass for each stream in it.
    #[serde(default)]
    pub stream: f64,
    /// Milliseconds to move KV from a prefill to a decode worker: a request, a token.
    pub transfer: [f64; 2],
    /// Milliseconds to bring up a token's KV: from host, from nvme. Layer by layer, beside the prompts' computing.
    #[serde(default = "onboard")]
    pub onboard: [f64; 2],
    /// The same from the network tier.
    #[serde(default = "network")]
    pub network: f64,
    /// Passes vary uniformly by this share of their duration.
    #[serde(default)]
    pub noise: f64,
}

/// 128 KiB a token over 50 GB/s and over 12 GB/s.
fn onboard() -> [f64; 2] {
    [0.0026, 0.011]
}

/// 128 KiB a token over 25 Gbit/s.
fn network() -> f64 {
    0.042
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            prefill: [16.5, 0.015183, 4.21e-7],
            context: 0.0,
            decode: [5.74, 54.01, -25.74],
            stream: 0.0,
            // 128 KiB a token over 64 GB/s.
            transfer: [0.5, 0.002],
            onboard: onboard(),
            network: network(),
            noise: 0.0,
        }
    }
}

impl Timing {
    /// Checks that all work takes time.
    pub fn check(&self) -> Result<()> {
        let [base, token, square] = self.prefill;
        let sane = base >= 0.0 && token > 0.0 && square >= 0.0 && self.decode[0] > 0.0;
        let mut moves = (self.transfer.iter())
            .chain(&self.onboard)
            .chain([&self.network]);
        let sane = sane && self.stream >= 0.0 && moves.all(|ms| *ms >= 0.0);
        if sane && self.context >= 0.0 && (0.0..1.0).contains(&self.noise) {
            Ok(())
        } else {
            Err(Error::invalid(format!("not a timing model: {self:?}")))
        }
    }

    /// Prefill of pieces that follow `before` tokens of their contexts each; `(tokens, before)`.
    pub fn prefill_ms(&self, pieces: &[(u32, u32)]) -> f64 {
        if pieces.is_empty() {
            return 0.0;
        }
        let tokens: f64 = pieces.iter().map(|&(n, _)| f64::from(n)).sum();
        let reach: f64 = pieces
            .iter()
            .map(|&(n, before)| f64::from(n) * f64::from(before))
            .sum();
        let [base, token, square] = self.prefill;
        base + token * tokens + square * tokens * tokens + self.context * reach
    }

    /// The part of a pass of so many streams when this share of the blocks is in use.
    pub fn decode_ms(&self, streams: usize, share: f64) -> f64 {
        let [base, linear, square] = self.decode;
        base + linear * share + square * share * share + self.stream * streams as f64
    }

    /// Bringing up the KV of so many tokens from host, nvme and network.
    pub fn onboard_ms(&self, tokens: [u32; 3]) -> f64 {
        let [host, nvme, network] = tokens.map(f64::from);
        self.onboard[0] * host + self.onboard[1] * nvme + self.network * network
    }

    /// Moving the KV of `tokens` between two workers.
    pub fn transfer_ms(&self, tokens: u32) -> f64 {
        self.transfer[0] + self.transfer[1] * f64::from(tokens)
    }
}
