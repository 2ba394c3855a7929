//! What goes into a selection and what comes out.

use smallvec::SmallVec;

use crate::rates::Probe;

/// One worker of a selector: a place in its table, and which of the workers that had that place.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "u64", from = "u64")]
pub struct WorkerId {
    pub(crate) index: u32,
    pub(crate) life: u32,
}

impl WorkerId {
    /// As a number, for callers that cannot hold the type.
    pub fn raw(self) -> u64 {
        u64::from(self.life) << 32 | u64::from(self.index)
    }

    /// The worker of a number that [`WorkerId::raw`] gave; of any other one, a worker that is not there.
    pub fn from_raw(raw: u64) -> Self {
        Self {
            index: raw as u32,
            life: (raw >> 32) as u32,
        }
    }
}

impl From<WorkerId> for u64 {
    fn from(id: WorkerId) -> Self {
        id.raw()
    }
}

impl From<u64> for WorkerId {
    fn from(raw: u64) -> Self {
        Self::from_raw(raw)
    }
}

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Computes prompts and generates.
    Aggregated,
    /// Computes prompts for decode workers.
    Prefill,
    /// Generates from prompts computed elsewhere.
    Decode,
}

/// A worker that joins.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct WorkerSpec {
    /// Stable across restarts, different between workers; what sessions are hashed to.
    pub key: u64,
    /// What it does.
    pub role: Role,
    /// Its hardware and configuration: workers of one class are expected to be equally fast.
    pub class: String,
    /// Prefill and decode workers are paired within a pool: those that can read each other's KV.
    pub pool: u32,
    /// Blocks in its KV pool.
    pub blocks: u32,
    /// Prompt tokens it computes in one pass.
    pub pass_tokens: u32,
    /// What it measured of itself.
    pub probe: Probe,
    /// What it can do that not every worker can: hashes of names, in any order.
    #[serde(default)]
    pub offers: Vec<u64>,
}

/// A request to be placed.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Request {
    /// The caller's name for it; unique among those placed or held.
    pub id: u64,
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Hashes of the prompt's whole blocks.
    #[serde(with = "crate::saved::hashes")]
    pub blocks: Box<[u64]>,
    /// Requests of one session share it; 0: none.
    pub session: u64,
    /// Whose it is: a hash of the tenant's name; 0: nobody's. Tenants that wait get shares.
    pub tenant: u64,
    /// Larger is more urgent, while requests wait; what is beyond [`crate::Admission::PRIORITIES`] counts as those.
    pub priority: i32,
    /// When its first token must be there, in the milliseconds of [`crate::Context::now`].
    pub deadline: Option<f64>,
    /// Workers that it must not go to.
    pub exclude: SmallVec<[WorkerId; 2]>,
    /// What its workers must offer, both halves of a pair: of [`WorkerSpec::offers`].
    #[serde(default)]
    pub needs: SmallVec<[u64; 2]>,
    /// The policy to use; None: the selector's own.
    pub policy: Option<crate::PolicyName>,
    /// Whether its placement carries all candidates.
    pub explain: bool,
}

/// An index's answer for one worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The worker.
    pub worker: WorkerId,
    /// Leading blocks it sees: on its device; on device or host; down to nvme; in any tier. Non-decreasing.
    pub depths: [u32; 4],
}

/// Where cached prefixes are. Asked anew when a held request is looked at again.
pub trait Lookup {
    /// Adds to `found` every worker that sees the first of `blocks`.
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>);

    /// The same of blocks that this call of the selector has looked up already, for those who only look on.
    fn again(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.matches(blocks, found);
    }
}

/// What a placement is predicted to take and to cost, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Terms {
    /// Until the prompts ahead of it are computed.
    pub queue: f64,
    /// Computing what of its prompt is not cached.
    pub prefill: f64,
    /// Bringing blocks up from slower tiers.
    pub onboard: f64,
    /// Moving the KV to the decode worker.
    pub transfer: f64,
    /// For requests that will come while it is computed.
    pub work: f64,
    /// For the streams it slows down while it is computed.
    pub streams: f64,
    /// For generating among the streams there.
    pub decode: f64,
    /// For the cached blocks it pushes out.
    pub evict: f64,
}

impl Terms {
    /// Names of the terms, in the order of [`Terms::values`].
    pub const NAMES: [&'static str; 8] = [
        "queue", "prefill", "onboard", "transfer", "work", "streams", "decode", "evict",
    ];

    /// The terms; the cost is their sum.
    pub fn values(&self) -> [f64; 8] {
        [
            self.queue,
            self.prefill,
            self.onboard,
            self.transfer,
            self.work,
            self.streams,
            self.decode,
            self.evict,
        ]
    }

    /// Predicted time to the first token.
    pub fn ttft(&self) -> f64 {
        self.queue + self.prefill + self.onboard + self.transfer
    }

    /// The cost.
    pub fn total(&self) -> f64 {
        self.ttft() + self.aside()
    }

    /// What it costs others, and itself after the first token.
    pub fn aside(&self) -> f64 {
        self.work + self.streams + self.decode + self.evict
    }
}

/// A placement that could be made.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Candidate {
    /// Computes the prompt.
    pub prefill: WorkerId,
    /// Generates; the same for an aggregated worker.
    pub decode: WorkerId,
    /// The prefill worker's stable key.
    pub key: u64,
    /// Requests there, both halves.
    pub requests: u32,
    /// Prompt tokens cached, by tier, each without those of faster tiers.
    pub cached: [u32; 4],
    /// What it costs.
    pub terms: Terms,
}

impl Candidate {
    /// Whether it is on the same workers.
    pub fn is_as(&self, other: &Self) -> bool {
        (self.prefill, self.decode) == (other.prefill, other.decode)
    }
}

/// A placement that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The request's id.
    pub request: u64,
    /// Names the lease on the workers: random, and 0 only where none was taken out ([`crate::Selector::select`]).
    pub lease: u64,
    /// Who won, and what it was predicted to take.
    pub winner: Candidate,
    /// The policy that chose.
    pub policy: crate::PolicyName,
    /// What it was chosen from, the cheapest first: all where the request asked, else as many as
    /// [`crate::Config::explained`], the winner in any case.
    pub candidates: Vec<Candidate>,
    /// The policy's cost of each of them, in its own unit; the lowest wins. A pair costs what its prefill worker does
    /// with the decode worker that was chosen first, and what its decode worker costs over that one.
    pub costs: Vec<f64>,
    /// Milliseconds that the request was held.
    pub held_ms: f64,
    /// What shadow policies would have chosen, in their order.
    pub shadows: Vec<Shadowed>,
}

/// What a policy that only looks on would have chosen, and what that is predicted to take.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Shadowed {
    /// The policy.
    pub policy: crate::PolicyName,
    /// Its choice.
    pub choice: Candidate,
    /// The placement that was made, as the shadow's rates see it.
    pub live: Terms,
}

impl Shadowed {
    /// Whether it would have placed the request as `winner`.
    pub fn agrees(&self, winner: &Candidate) -> bool {
        self.choice.is_as(winner)
    }

    /// Milliseconds of predicted cost that its choice would have saved; less than 0 where it would have cost more.
    pub fn regret(&self) -> f64 {
        self.live.total() - self.choice.terms.total()
    }
}
