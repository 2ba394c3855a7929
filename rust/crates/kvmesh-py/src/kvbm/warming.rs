//! `Warming`: a plan to fill a node's memory ahead of traffic, as far as it has come.

use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmesh_kvbm::store;
use pyo3::prelude::*;

/// Blocks that are to come up, until they have.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct Warming(Mutex<store::Warming>);

impl Warming {
    pub(super) fn new(plan: store::Warming) -> Self {
        Self(Mutex::new(plan))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, store::Warming> {
        // A panic inside leaves a plan that is as good as before.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Warming {
    #[getter]
    fn left(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.lock().left)
    }
}
