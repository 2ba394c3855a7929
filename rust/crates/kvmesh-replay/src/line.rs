//! The lines of a log.

use kvmesh_select::{Candidate, Placed, PolicyName, Reason, Refused, WorkerId};
use serde::{Deserialize, Serialize};

use crate::{
    input::{Answer, Input},
    lookups::Answered,
};

/// Of the lines, and of the state in snapshots.
pub const VERSION: u32 = 5;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The first of a file.
    Head(Head),
    /// Everything that what follows depends on; the second of a file, and after a gap.
    Snapshot(Snapshot),
    /// A call and what came of it.
    Call(Call),
    /// Calls that were not written.
    Gap(Gap),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    pub version: u32,
    /// The model whose requests are placed.
    pub model: String,
    /// One life of a router; its files follow each other.
    pub run: String,
    /// Seconds since the epoch at time 0.
    pub epoch: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Milliseconds, as all times in a log.
    pub at: f64,
    /// The source of chance: ChaCha with 8 rounds, by its key in hex and its position in words.
    pub chance: (String, String),
    /// The selector, in postcard's format and base64.
    pub state: String,
    pub workers: Vec<(WorkerId, String)>,
    /// Policies from outside, by their numbers.
    pub policies: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    pub at: f64,
    #[serde(rename = "in")]
    pub input: Input,
    /// What was looked up and is news: the look-up's number in the call, and the answer.
    #[serde(default)]
    pub found: Vec<(u32, Answered)>,
    /// What policies from outside said.
    #[serde(default)]
    pub judged: Vec<Vec<f64>>,
    #[serde(default)]
    pub answer: Answer,
    #[serde(default)]
    pub out: Vec<Outcome>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Gap {
    pub lines: u64,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Placed(Placement),
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub request: u64,
    pub lease: u64,
    pub policy: PolicyName,
    pub winner: Winner,
    pub held_ms: f64,
    /// What shadows would have chosen. Not a part of the decision.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shadows: Vec<ShadowLine>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Winner {
    pub prefill: WorkerId,
    pub decode: WorkerId,
    pub cached: [u32; 4],
    /// In the order of [`kvmesh_select::Terms::NAMES`].
    pub terms: [f64; 8],
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShadowLine {
    pub policy: PolicyName,
    pub prefill: WorkerId,
    pub decode: WorkerId,
    pub cost: f64,
    pub ttft: f64,
    /// Of the placement that was made, as the shadow saw it.
    pub live_cost: f64,
    pub live_ttft: f64,
    /// Of the costs: what the shadow's choice would have saved.
    pub regret: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    pub request: u64,
    pub reason: Reason,
    pub retry_after_ms: f64,
    pub held_ms: f64,
}

impl From<&Candidate> for Winner {
    fn from(candidate: &Candidate) -> Self {
        Self {
            prefill: candidate.prefill,
            decode: candidate.decode,
            cached: candidate.cached,
            terms: candidate.terms.values(),
        }
    }
}

impl From<&Placed> for Placement {
    fn from(placed: &Placed) -> Self {
        let shadow = |one: &kvmesh_select::Shadowed| ShadowLine {
            policy: one.policy,
            prefill: one.choice.prefill,
            decode: one.choice.decode,
            cost: one.choice.terms.total(),
            ttft: one.choice.terms.ttft(),
            live_cost: one.live.total(),
            live_ttft: one.live.ttft(),
            regret: one.regret(),
        };
        Self {
            request: placed.request,
            lease: placed.lease,
            policy: placed.policy,
            winner: Winner::from(&placed.winner),
            held_ms: placed.held_ms,
            shadows: placed.shadows.iter().map(shadow).collect(),
        }
    }
}

impl From<&Refused> for Refusal {
    fn from(refused: &Refused) -> Self {
        Self {
            request: refused.request,
            reason: refused.reason,
            retry_after_ms: refused.retry_after_ms,
            held_ms: refused.held_ms,
        }
    }
}

impl Outcome {
    /// All of a call, placements first.
    pub fn of(placed: &[Placed], refused: &[Refused]) -> Vec<Self> {
        let placed = placed.iter().map(|one| Self::Placed(one.into()));
        placed
            .chain(refused.iter().map(|one| Self::Refused(one.into())))
            .collect()
    }

    /// Without what shadows said.
    pub fn bare(mut self) -> Self {
        if let Self::Placed(placement) = &mut self {
            placement.shadows.clear();
        }
        self
    }
}
