//! When requests wait for capacity, for how long, and what a request is told that may not wait.

use std::{collections::BTreeMap, fmt};

/// The bounds of admission. While some worker has room, requests are placed and none of this counts. Times in
/// milliseconds.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Admission {
    /// A worker has no room whose queue of prompts will take longer than this.
    pub backlog_ms: f64,
    /// A worker has no room whose requests fill this share of its KV pool with blocks of their own.
    pub pool_share: f64,
    /// Requests that wait at most.
    pub max_held: usize,
    /// A request is placed within this time, or refused.
    pub max_wait_ms: f64,
    /// Prompt tokens that a tenant of weight 1 is granted in each round.
    pub quantum_tokens: u32,
    /// Releases that a waiting class lets pass to more urgent ones before it is its turn.
    pub aging: u32,
    /// Shares of tenants within a class, by [`crate::Request::tenant`], from 0.01 to 100; 1 for those not named.
    pub weights: BTreeMap<u64, f64>,
}

impl Default for Admission {
    fn default() -> Self {
        Self {
            backlog_ms: 2_000.0,
            pool_share: 1.0,
            max_held: 1_024,
            max_wait_ms: 30_000.0,
            quantum_tokens: 1_024,
            aging: 8,
            weights: BTreeMap::new(),
        }
    }
}

impl Admission {
    /// The least and the most urgent priority.
    pub const PRIORITIES: (i32, i32) = (-10, 10);
    /// Classes that can be, one a priority.
    pub const CLASSES: usize = (Self::PRIORITIES.1 - Self::PRIORITIES.0 + 1) as usize;

    /// Every request is placed, whatever the load.
    pub fn off() -> Self {
        Self {
            backlog_ms: f64::INFINITY,
            pool_share: f64::INFINITY,
            max_wait_ms: f64::INFINITY,
            ..Self::default()
        }
    }
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Too many wait already, and most of them are its tenant's.
    Full,
    /// It waited as long as any request may.
    Waited,
    /// Its deadline cannot be met any more.
    Deadline,
    /// The workers that it could go to have left.
    NoWorker,
}

impl Reason {
    /// The name in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Waited => "waited",
            Self::Deadline => "deadline",
            Self::NoWorker => "no-worker",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A request that will not be placed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Refused {
    /// The request's id.
    pub request: u64,
    /// Milliseconds until what waits now will have left, at the rate at which requests leave.
    pub retry_after_ms: f64,
    /// Why.
    pub reason: Reason,
    /// Milliseconds that it was held.
    pub held_ms: f64,
}
