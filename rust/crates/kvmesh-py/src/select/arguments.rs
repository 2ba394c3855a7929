//! What Python says, as the selector takes it.

use std::{collections::BTreeMap, path::PathBuf};

use kvmesh_replay::LogConfig;
use kvmesh_select::{Admission, PolicyName, Probe, Report, Role, UnknownPolicy};
use pyo3::{exceptions::PyValueError, prelude::*};

/// (lease, prompt computed, tokens generated, transfer ms, ended).
pub type ReportTuple = (u64, bool, u32, f64, bool);

pub fn report((lease, prefilled, output_tokens, transfer_ms, ended): ReportTuple) -> Report {
    Report {
        lease,
        prefilled,
        output_tokens,
        transfer_ms,
        ended,
    }
}

pub fn role(name: &str) -> PyResult<Role> {
    match name {
        "aggregated" => Ok(Role::Aggregated),
        "prefill" => Ok(Role::Prefill),
        "decode" => Ok(Role::Decode),
        _ => Err(PyValueError::new_err(format!("unknown role `{name}`"))),
    }
}

pub fn probe(
    prefill: Vec<(u32, u32, f64)>,
    decode: Vec<(u32, f64, f64)>,
    transfer: Vec<(u32, f64)>,
) -> Probe {
    Probe {
        prefill,
        decode,
        transfer,
    }
}

pub fn policy(name: &str) -> PyResult<PolicyName> {
    let parsed = name.parse();
    parsed.map_err(|error: UnknownPolicy| PyValueError::new_err(error.to_string()))
}

/// What is None is as it is by default.
pub fn admission(
    max_held: Option<usize>,
    max_wait_ms: Option<f64>,
    weights: Option<BTreeMap<u64, f64>>,
) -> Admission {
    let standard = Admission::default();
    Admission {
        max_held: max_held.unwrap_or(standard.max_held),
        max_wait_ms: max_wait_ms.unwrap_or(standard.max_wait_ms),
        weights: weights.unwrap_or_default(),
        ..standard
    }
}

pub fn log(
    directory: PathBuf,
    model: String,
    run: String,
    epoch: f64,
    max_bytes: u64,
    max_files: usize,
    max_queued: u64,
) -> LogConfig {
    LogConfig {
        directory,
        model,
        run,
        epoch,
        max_bytes,
        max_files,
        max_queued,
    }
}
