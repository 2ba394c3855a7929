//! The KV store's two ends: [`server`] in the kvbm process, and in engines what [`client`] has; [`network`] is
//! what stores of different nodes give each other.

mod client;
mod network;
mod objects;
mod server;
mod warming;

use std::time::Duration;

use kvmesh_core::BlockHash;
use kvmesh_kvbm::eviction::Hints;
use kvmesh_kvbm::eviction::Policy;
use kvmesh_kvbm::journal::Change;
use kvmesh_kvbm::latency::{BOUNDS_S, Observed};
use kvmesh_kvbm::store::{Flow, Scrubbed};
use kvmesh_kvbm::tiers::{Health, Stats};
use kvmesh_kvbm::{Digest, Error};
use pyo3::create_exception;
use pyo3::exceptions::{PyConnectionError, PyException, PyLookupError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

pub use self::client::{Lease, Pages, StoreClient};
pub use self::network::{Incoming, Lent};
pub use self::objects::{PyObjects, objects_dict};
pub use self::server::StoreServer;
pub use self::warming::Warming;
use crate::error;
use crate::integers::Tokens;

create_exception!(
    kvmesh.core,
    CorruptBlockError,
    PyException,
    "A block's bytes are not those that were stored; it is dropped."
);

/// ConnectionError: the store is gone, connect again. OSError: memory, socket or file system. LookupError: a block did
/// not come from the disk. CorruptBlockError. All else is a ValueError.
pub(crate) fn to_py(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Disconnected(_) | Error::Protocol(_) => PyConnectionError::new_err(message),
        Error::NoSpace { .. }
        | Error::SocketTaken(_)
        | Error::Io { .. }
        | Error::Offline(_)
        | Error::Storage { .. }
        | Error::NotKept { .. }
        | Error::DirectoryTaken(_) => PyOSError::new_err(message),
        Error::Lost(_) => PyLookupError::new_err(message),
        Error::Corrupt { .. } => CorruptBlockError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

/// 32-byte digests one after the other.
pub(crate) fn chain(digests: &[u8]) -> PyResult<Vec<Digest>> {
    let exact = digests.chunks_exact(32);
    if !exact.remainder().is_empty() {
        return Err(PyValueError::new_err("digests must be 32 bytes each"));
    }
    Ok(exact
        .map(|chunk| Digest::new(std::array::from_fn(|at| chunk[at])))
        .collect())
}

/// The whole digests of every whole page, one after the other.
#[pyfunction]
#[pyo3(signature = (tokens, page_size, parent = &b""[..]), text_signature = "(tokens, page_size, parent=b'')")]
pub fn page_digests<'py>(
    py: Python<'py>,
    tokens: Tokens,
    page_size: usize,
    parent: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let digests = py.detach(|| {
        let parent = Digest::from_namespace(parent)?;
        let mut digests =
            Vec::with_capacity(tokens.0.len().checked_div(page_size).unwrap_or(0) * 32);
        kvmesh_core::hash_pages(&tokens.0, page_size, parent, |digest| {
            digests.extend(digest.as_bytes())
        })?;
        Ok(digests)
    });
    digests
        .map(|digests| PyBytes::new(py, &digests))
        .map_err(error::to_py)
}

/// (kind, parent, hashes): "stored" with the parent or None, "removed", or "lost".
type PyChange = (&'static str, Option<u64>, Vec<u64>);

fn changes(changes: Vec<Change>) -> Vec<PyChange> {
    let numbers = |hashes: Vec<BlockHash>| hashes.into_iter().map(|hash| hash.0).collect();
    let each = |change| match change {
        Change::Stored { parent, hashes } => ("stored", parent.map(|hash| hash.0), numbers(hashes)),
        Change::Removed { hashes } => ("removed", None, numbers(hashes)),
        Change::Lost => ("lost", None, Vec::new()),
    };
    changes.into_iter().map(each).collect()
}

/// A tier's numbers.
pub(crate) fn stats_dict<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    for (name, value) in [
        ("capacity_bytes", stats.capacity_bytes),
        ("used_bytes", stats.used_bytes),
        ("blocks", stats.blocks),
        ("blocks_in_use", stats.blocks_in_use),
        ("stored", stats.stored),
        ("loaded", stats.loaded),
        ("stored_bytes", stats.stored_bytes),
        ("loaded_bytes", stats.loaded_bytes),
        ("hinted", stats.hinted),
        ("lookups", stats.lookups),
        ("hits", stats.hits),
        ("corrupt", stats.corrupt),
    ] {
        values.set_item(name, value)?;
    }
    let evicted = PyDict::new(py);
    for (reason, count) in stats.evicted.by_reason() {
        evicted.set_item(reason, count)?;
    }
    values.set_item("evicted", evicted)?;
    Ok(values)
}

/// What the scrubber has checked, tier by tier.
pub(crate) fn scrubbed_dict(
    py: Python<'_>,
    scrubbed: Vec<(kvmesh_core::Tier, Scrubbed)>,
) -> PyResult<Bound<'_, PyDict>> {
    let values = PyDict::new(py);
    for (tier, total) in scrubbed {
        let of_tier = PyDict::new(py);
        for (name, value) in [
            ("blocks", total.blocks),
            ("bytes", total.bytes),
            ("corrupt", total.corrupt),
            ("passes", total.passes),
        ] {
            of_tier.set_item(name, value)?;
        }
        values.set_item(tier_name(tier), of_tier)?;
    }
    Ok(values)
}

/// The tier, the operation, how many took at most each bound in seconds and more than the one before, and the sum.
type PyLatency = (&'static str, &'static str, Vec<(f64, u64)>, f64);

fn latencies(latencies: Vec<(kvmesh_core::Tier, &'static str, Observed)>) -> Vec<PyLatency> {
    let bounds = BOUNDS_S.into_iter().chain([f64::INFINITY]);
    let one = |(tier, operation, observed): (_, _, Observed)| {
        let counts = bounds.clone().zip(observed.counts).collect();
        let seconds = observed.time.as_secs_f64();
        (tier_name(tier), operation, counts, seconds)
    };
    latencies.into_iter().map(one).collect()
}

/// What went between the tiers, and whether the lower one works.
pub(crate) fn flow_dict<'py>(
    py: Python<'py>,
    flow: &Flow,
    health: &Health,
) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    for (name, value) in [
        ("spilled", flow.spilled),
        ("shed", flow.shed),
        ("unlikely", flow.unlikely),
        ("over_budget", flow.over_budget),
        ("unplaced", flow.unplaced),
        ("waiting", flow.waiting),
        ("promoted", flow.promoted),
        ("failed", flow.failed),
        ("coming", flow.coming),
        ("late", flow.late),
        ("outages", health.outages),
        ("recovered", health.recovered),
        ("written_bytes", health.written_bytes),
        ("read_bytes", health.read_bytes),
    ] {
        values.set_item(name, value)?;
    }
    values.set_item("problem", health.problem.as_deref())?;
    values.set_item("io", &health.io)?;
    Ok(values)
}

pub(crate) fn tier_name(tier: kvmesh_core::Tier) -> &'static str {
    match tier {
        kvmesh_core::Tier::Device => "device",
        kvmesh_core::Tier::Host => "host",
        kvmesh_core::Tier::Nvme => "nvme",
        kvmesh_core::Tier::Network => "network",
    }
}

pub(crate) fn policy(name: &str) -> PyResult<Policy> {
    name.parse().map_err(PyValueError::new_err)
}

/// (session, returns, tool_call, returns_in_s).
type PyHintsFields = (Option<u64>, Option<bool>, bool, Option<f32>);

/// Hints as Python gives them.
#[derive(FromPyObject)]
#[pyo3(transparent)]
pub struct PyHints(PyHintsFields);

impl From<PyHints> for Hints {
    fn from(PyHints((session, returns, tool_call, returns_in)): PyHints) -> Self {
        Self {
            session,
            returns,
            tool_call,
            returns_in,
        }
    }
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err("a time must be finite and not negative"))
}
