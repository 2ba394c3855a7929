//! What Python says, as the selector takes it.

use std::collections::BTreeMap;

use kvmesh_select::{Admission, Role};
use pyo3::{exceptions::PyValueError, prelude::*};

pub fn role(name: &str) -> PyResult<Role> {
    match name {
        "aggregated" => Ok(Role::Aggregated),
        "prefill" => Ok(Role::Prefill),
        "decode" => Ok(Role::Decode),
        _ => Err(PyValueError::new_err(format!("unknown role `{name}`"))),
    }
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
