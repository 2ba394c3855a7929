//! What a selector can be told.

use crate::{admission::Admission, cost::Prices, policy::PolicyName};

/// What a selector can be told to do differently.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Config {
    /// Tokens in a block.
    pub block_tokens: u32,
    /// The policy of requests that name none.
    pub policy: PolicyName,
    /// Softens the choice; 0: the lowest cost wins.
    pub temperature: f64,
    /// Whether `kv` holds requests back while workers are busy, and places them as a plan. Not with a temperature.
    pub joint: bool,
    /// Milliseconds that a joint plan waits for others after the first request, so that a burst is planned as one.
    pub gather_ms: f64,
    /// Of lowest cost, so many candidates are what placements carry; of requests that ask, all.
    pub explained: usize,
    /// A lease of which nothing is heard for so many milliseconds is reclaimed.
    pub lease_ttl_ms: f64,
    /// What cost is worth to others.
    pub prices: Prices,
    /// When requests wait, and for how long.
    pub admission: Admission,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            block_tokens: 64,
            policy: PolicyName::Kv,
            temperature: 0.0,
            joint: true,
            gather_ms: 0.2,
            explained: 0,
            lease_ttl_ms: 30_000.0,
            prices: Prices::default(),
            admission: Admission::default(),
        }
    }
}
