//! All that a selector is ever told, as data.

use kvmesh_select::{Adopted, Report, Request, WorkerId, WorkerSpec, saved};
use serde::{Deserialize, Serialize};

/// One call of a selector.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    /// [`kvmesh_select::Selector::add_worker`].
    AddWorker {
        /// As people know it.
        name: String,
        /// What it is.
        spec: WorkerSpec,
    },
    /// [`kvmesh_select::Selector::remove_worker`].
    RemoveWorker {
        /// Which.
        worker: WorkerId,
    },
    /// [`kvmesh_select::Selector::submit`].
    Submit {
        /// The request's id as its client knows it.
        name: String,
        /// What is to be placed.
        request: Request,
    },
    /// [`kvmesh_select::Selector::withdraw`].
    Withdraw {
        /// The request's number.
        request: u64,
    },
    /// [`kvmesh_select::Selector::adopt`].
    Adopt(Adopted),
    /// [`kvmesh_select::Selector::progress_moved`].
    Progress {
        /// Whose.
        lease: u64,
        /// Its prompt is computed.
        prefilled: bool,
        /// So far.
        output_tokens: u32,
        /// In which its KV was moved; 0: not known.
        transfer_ms: f64,
    },
    /// [`kvmesh_select::Selector::end`].
    End {
        /// Which.
        lease: u64,
    },
    /// [`kvmesh_select::Selector::report`].
    Report {
        /// What came at once.
        reports: Vec<Report>,
    },
    /// [`kvmesh_select::Selector::tick`].
    Tick,
    /// [`kvmesh_select::Selector::stored`].
    Stored {
        /// Where.
        worker: WorkerId,
        /// Which blocks.
        #[serde(with = "saved::hashes")]
        hashes: Box<[u64]>,
    },
    /// [`kvmesh_select::Selector::removed`].
    Removed {
        /// Where.
        worker: WorkerId,
        /// Which blocks.
        #[serde(with = "saved::hashes")]
        hashes: Box<[u64]>,
    },
    /// [`kvmesh_select::Selector::cleared`].
    Cleared {
        /// Where.
        worker: WorkerId,
    },
    /// A policy of the router's own joins those that requests may name, under the next number.
    AddPolicy {
        /// As requests name it.
        name: String,
    },
    /// What holds from now on was changed at run time.
    Set(Changes),
}

/// A change of configuration; what is None stays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// Who asked for it.
    pub by: String,
    /// The policy of requests that name none.
    pub policy: Option<String>,
    /// How soft choices are.
    pub temperature: Option<f64>,
    /// Requests that wait at most.
    pub max_held: Option<usize>,
    /// How long each of them waits at most.
    pub max_wait_ms: Option<f64>,
    /// Policies that look on.
    pub shadows: Option<Vec<String>>,
}

/// What a call returned, beside placements and refusals.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Nothing.
    #[default]
    Done,
    /// No worker can take the request.
    NoWorker,
    /// No such lease or request.
    Unknown,
    /// Leases that are not held, of those reported on.
    NotHeld(Vec<u64>),
    /// The worker's id.
    Worker(WorkerId),
    /// Leases that expired.
    Expired(Vec<u64>),
}
