//! A decision log read again.

use std::path::PathBuf;

use kvmesh_replay::{Options, ReplayError};
use pyo3::{
    exceptions::{PyFileNotFoundError, PyOSError, PyValueError},
    prelude::*,
};

/// Make the decisions of a log again: of a file, or of every log in a directory. policy is asked at every decision what it
/// would have chosen; rates, {hardware class: {law: {coefficient: ms}}}, what it would have been by these. Returns JSON, a
/// report for each model. Raises OSError, or ValueError for what is no log, or no policy of kvmesh's own.
#[pyfunction]
#[pyo3(signature = (path, *, policy = None, rates = None))]
pub fn replay(
    py: Python<'_>,
    path: PathBuf,
    policy: Option<String>,
    rates: Option<kvmesh_select::GivenRates>,
) -> PyResult<String> {
    let options = Options { policy, rates };
    let reports = py.detach(|| kvmesh_replay::replay(&path, &options));
    let reports = reports.map_err(|error| match error {
        ReplayError::Io { .. } => PyOSError::new_err(error.to_string()),
        ReplayError::Nothing(_) => PyFileNotFoundError::new_err(error.to_string()),
        ReplayError::Line { .. } | ReplayError::Policy(_) => {
            PyValueError::new_err(error.to_string())
        }
    })?;
    serde_json::to_string(&reports).map_err(|error| PyValueError::new_err(error.to_string()))
}
