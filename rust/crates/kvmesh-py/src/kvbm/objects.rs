//! Object storage, as Python names it and is told of it.

use std::time::Duration;

use kvmesh_kvbm::store::{Archived, Recalled};
use kvmesh_kvbm::tiers::{Credentials, Health, ObjectSettings};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::seconds;

/// `ObjectOptions` in Python.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct PyObjects {
    url: String,
    bytes: u64,
    endpoint: Option<String>,
    region: Option<String>,
    /// Key, secret, and token.
    credentials: Option<(String, String, Option<String>)>,
    timeout_s: f64,
    refresh_s: f64,
}

impl PyObjects {
    pub fn settings(self) -> PyResult<ObjectSettings> {
        let credentials = self.credentials.map(|(id, secret, token)| Credentials {
            access_key_id: id,
            secret_access_key: secret,
            session_token: token,
        });
        Ok(ObjectSettings {
            url: self.url,
            endpoint: self.endpoint,
            region: self.region,
            credentials,
            bytes: self.bytes,
            timeout: seconds(self.timeout_s)?.max(Duration::from_millis(1)),
            refresh: seconds(self.refresh_s)?,
            writable: true,
        })
    }
}

/// What went to object storage and came from there, and whether it works.
pub fn objects_dict<'py>(
    py: Python<'py>,
    (archived, recalled, health): &(Archived, Recalled, Health),
) -> PyResult<Bound<'py, PyDict>> {
    let values = PyDict::new(py);
    for (name, value) in [
        ("written", archived.written),
        ("waiting", archived.waiting),
        ("recalled", recalled.blocks),
        ("recalled_bytes", recalled.bytes),
        ("bytes_per_s", recalled.bytes_per_s),
        ("outages", health.outages),
        ("recovered", health.recovered),
        ("written_bytes", health.written_bytes),
        ("read_bytes", health.read_bytes),
    ] {
        values.set_item(name, value)?;
    }
    let skipped = PyDict::new(py);
    for (reason, blocks) in [
        ("shed", archived.shed),
        ("left", archived.left),
        ("unplaced", archived.unplaced),
        ("failed", archived.failed),
    ] {
        skipped.set_item(reason, blocks)?;
    }
    let missed = PyDict::new(py);
    for (reason, blocks) in recalled.by_reason() {
        missed.set_item(reason, blocks)?;
    }
    values.set_item("skipped", skipped)?;
    values.set_item("missed", missed)?;
    values.set_item("problem", health.problem.as_deref())?;
    values.set_item("url", &health.io)?;
    Ok(values)
}
