//! Policies: candidates in, costs out; the lowest wins.
//!
//! A policy judges; it places nothing and sees no clock, so that a decision can be made again from what was logged.
//! `tests/policies.rs` runs every one of them.

mod kv;
mod least_loaded;
mod power_of_two;
mod random;
mod round_robin;
mod session;

use std::{fmt, str::FromStr};

use rand::RngCore;

use crate::{
    choose::Margin,
    types::{Candidate, Request},
};

/// Judges placements.
pub trait Policy: Send + Sync {
    /// Adds the cost of each candidate to `costs`, in order.
    fn costs(
        &mut self,
        request: &Request,
        candidates: &[Candidate],
        chance: &mut dyn RngCore,
        costs: &mut Vec<f64>,
    );

    /// Costs this close count as equal.
    fn margin(&self) -> Margin {
        Margin {
            absolute: 0.0,
            relative: 0.0,
        }
    }

    /// Told of the candidate that won, for policies that remember.
    fn placed(&mut self, _winner: &Candidate) {}

    /// What it remembers, to be kept; 0 for nothing.
    fn memory(&self) -> u128 {
        0
    }

    /// Goes on from what another one of its name remembered.
    fn recall(&mut self, _memory: u128) {}
}

/// The policies by name.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyName {
    /// Lowest predicted cost in milliseconds; jointly over waiting requests.
    #[default]
    Kv,
    /// In turn.
    RoundRobin,
    /// By chance.
    Random,
    /// Fewest live requests.
    LeastLoaded,
    /// The less loaded of two chosen by chance.
    PowerOfTwo,
    /// All of a session on one worker.
    Session,
    /// One that the caller added under this number.
    External(u16),
}

impl PolicyName {
    /// All that are built in.
    pub const ALL: [Self; 6] = [
        Self::Kv,
        Self::RoundRobin,
        Self::Random,
        Self::LeastLoaded,
        Self::PowerOfTwo,
        Self::Session,
    ];

    /// The name in configuration and requests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::LeastLoaded => "least-loaded",
            Self::PowerOfTwo => "power-of-two",
            Self::Session => "session",
            Self::External(_) => "external",
        }
    }

    /// A new policy of this name. An external one judges as `kv` does until it is added.
    pub fn make(self) -> Box<dyn Policy> {
        match self {
            Self::Kv | Self::External(_) => Box::new(kv::Kv),
            Self::RoundRobin => Box::new(round_robin::RoundRobin::default()),
            Self::Random => Box::new(random::Random),
            Self::LeastLoaded => Box::new(least_loaded::LeastLoaded),
            Self::PowerOfTwo => Box::new(power_of_two::PowerOfTwo),
            Self::Session => Box::new(session::Session),
        }
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown policy `{0}`; known: kv, round-robin, random, least-loaded, power-of-two, session"
)]
pub struct UnknownPolicy(pub String);

impl FromStr for PolicyName {
    type Err = UnknownPolicy;

    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.name() == name)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}
