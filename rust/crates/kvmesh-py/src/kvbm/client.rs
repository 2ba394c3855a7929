//! An engine's end: its pages, its way to the store of its node, and its leases there.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmesh_kvbm::control::{self, ClientLease};
use kvmesh_kvbm::{Error, Namespace};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::{PyHints, chain, seconds, to_py};

/// Where an engine's pages lie; keeps their owners alive.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct Pages {
    pages: kvmesh_kvbm::Pages,
    _owners: Py<PyList>,
}

#[pymethods]
impl Pages {
    #[new]
    fn new(
        owners: Py<PyList>,
        bases: Vec<usize>,
        strides: Vec<usize>,
        segments: Vec<usize>,
        count: usize,
    ) -> PyResult<Self> {
        // SAFETY: the Python class's contract: `owners` own the memory described and are kept with it, and callers
        // pass only pages that nobody else accesses during a copy.
        let pages = unsafe { kvmesh_kvbm::Pages::new(&bases, &strides, &segments, count) };
        let pages = pages.map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self {
            pages,
            _owners: owners,
        })
    }

    fn __len__(&self) -> usize {
        self.pages.count()
    }
}

/// An engine's way to the store of its node.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct StoreClient(control::StoreClient);

#[pymethods]
impl StoreClient {
    #[new]
    #[pyo3(signature = (socket, *, model, revision, dtype, layout, rank, ranks, segments, engine, timeout_s))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        socket: PathBuf,
        model: String,
        revision: String,
        dtype: String,
        layout: String,
        rank: u32,
        ranks: u32,
        segments: Vec<u32>,
        engine: u64,
        timeout_s: f64,
    ) -> PyResult<Self> {
        if segments.is_empty() || segments.contains(&0) {
            return Err(PyValueError::new_err(
                "a block needs segments of at least one byte",
            ));
        }
        let namespace = Namespace {
            model,
            revision,
            dtype,
            layout,
            rank,
            ranks,
            segments,
        };
        Ok(Self(control::StoreClient::new(
            &socket,
            namespace,
            engine,
            seconds(timeout_s)?,
        )))
    }

    fn connect(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.connect()).map_err(to_py)
    }

    #[getter]
    fn connected(&self, py: Python<'_>) -> bool {
        py.detach(|| self.0.is_connected())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    fn lookup(&self, py: Python<'_>, digests: &[u8]) -> PyResult<usize> {
        let chain = chain(digests)?;
        py.detach(|| self.0.lookup(&chain)).map_err(to_py)
    }

    fn lookup_for(
        &self,
        py: Python<'_>,
        digests: &[u8],
        per_block_s: f64,
    ) -> PyResult<(usize, bool)> {
        let (chain, per_block) = (chain(digests)?, seconds(per_block_s)?);
        let found = py.detach(|| self.0.lookup_for(&chain, per_block));
        found
            .map(|found| (found.blocks, found.coming))
            .map_err(to_py)
    }

    #[pyo3(signature = (parent, digests, pages, ids, tenant = ""))]
    fn offload(
        &self,
        py: Python<'_>,
        parent: Option<&[u8]>,
        digests: &[u8],
        pages: &Pages,
        ids: Vec<u32>,
        tenant: &str,
    ) -> PyResult<(usize, usize, usize)> {
        let parent = parent.map(chain).transpose()?.unwrap_or_default();
        let chain = chain(digests)?;
        let offload = || (self.0).offload_for(tenant, parent.first(), &chain, &pages.pages, &ids);
        py.detach(offload)
            .map(|done| (done.stored, done.present, done.full))
            .map_err(to_py)
    }

    fn hint(&self, py: Python<'_>, digests: &[u8], hints: PyHints) -> PyResult<()> {
        let (blocks, hints) = (chain(digests)?, hints.into());
        py.detach(|| self.0.hint(&blocks, &hints)).map_err(to_py)
    }

    fn lease(&self, py: Python<'_>, digests: &[u8]) -> PyResult<Option<Lease>> {
        let chain = chain(digests)?;
        let leased = py.detach(|| self.0.lease(&chain)).map_err(to_py)?;
        Ok(leased.map(|lease| Lease(Mutex::new(Some(lease)))))
    }
}

/// Blocks that stay in the arena until `release`.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct Lease(Mutex<Option<ClientLease>>);

impl Lease {
    fn lock(&self) -> MutexGuard<'_, Option<ClientLease>> {
        // A panic inside leaves nothing half-done that dropping the lease would not end.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Lease {
    fn load(
        &self,
        py: Python<'_>,
        pages: &Pages,
        ids: Vec<u32>,
        first: usize,
        end: usize,
    ) -> PyResult<()> {
        let load = || match self.lock().as_mut() {
            Some(lease) => lease.load(&pages.pages, &ids, first, end),
            None => Err(Error::Invalid("the lease has been released".into())),
        };
        py.detach(load).map_err(to_py)
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }

    #[getter]
    fn origins(&self, py: Python<'_>) -> (u32, u32) {
        let origins = py.detach(|| self.lock().as_ref().map(ClientLease::origins));
        origins.map_or((0, 0), |origins| (origins.nvme, origins.network))
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().as_ref().map_or(0, ClientLease::blocks))
    }
}
