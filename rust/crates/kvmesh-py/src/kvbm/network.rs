//! What stores of different nodes lend to and expect from each other.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvmesh_core::BlockHash;
use kvmesh_index::{Matches, PrefixIndex};
use kvmesh_kvbm::{Namespace, store};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// (model, revision, dtype, layout), (rank, ranks), segments.
pub type PyNamespace = ((String, String, String, String), (u32, u32), Vec<u32>);

/// Number, namespace, the digest of the block before the first, digests, and the seconds left.
pub type PyWanted<'py> = (
    u64,
    PyNamespace,
    Bound<'py, PyBytes>,
    Bound<'py, PyBytes>,
    f64,
);

pub fn namespace(fields: PyNamespace) -> Namespace {
    let ((model, revision, dtype, layout), (rank, ranks), segments) = fields;
    Namespace {
        model,
        revision,
        dtype,
        layout,
        rank,
        ranks,
        segments,
    }
}

pub fn fields(name: Namespace) -> PyNamespace {
    (
        (name.model, name.revision, name.dtype, name.layout),
        (name.rank, name.ranks),
        name.segments,
    )
}

thread_local! {
    /// The last answer of this thread, kept for its memory.
    static MATCHES: RefCell<Matches> = RefCell::new(Matches::new());
}

/// An index of other nodes' stores, each on a node of its own, as the engine there sees it.
pub struct Neighbours(pub Arc<PrefixIndex>);

impl store::Elsewhere for Neighbours {
    fn leading(&self, chain: &[BlockHash]) -> usize {
        let hashes: Vec<u64> = chain.iter().map(|hash| hash.0).collect();
        MATCHES.with_borrow_mut(|matches| {
            self.0.matches(&hashes, matches);
            // What is in object storage is not theirs alone.
            let own = matches.iter().map(|engine| engine.depths[2]);
            own.max().unwrap_or(0) as usize
        })
    }
}

/// Blocks that another store may read, until `release`.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct Lent(Mutex<Option<store::Lent>>);

impl Lent {
    pub fn new(lent: store::Lent) -> Self {
        Self(Mutex::new(Some(lent)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<store::Lent>> {
        // A panic inside leaves nothing half-done that dropping it would not end.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Lent {
    #[getter]
    fn digests<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let lent = py.detach(|| self.lock().as_ref().map(|lent| concat(lent.digests())));
        PyBytes::new(py, &lent.unwrap_or_default())
    }

    #[getter]
    fn offsets(&self, py: Python<'_>) -> Vec<u64> {
        let of = |lent: &store::Lent| lent.slots().iter().map(|slot| slot.0).collect();
        py.detach(|| self.lock().as_ref().map(of).unwrap_or_default())
    }

    #[getter]
    fn slot_bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().as_ref().map_or(0, store::Lent::slot_bytes))
    }

    fn doubt(&self, py: Python<'_>, places: Vec<usize>) -> usize {
        py.detach(|| self.lock().as_ref().map_or(0, |lent| lent.doubt(&places)))
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

/// Slots of blocks on their way from another store.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct Incoming(Mutex<Option<store::Incoming>>);

impl Incoming {
    pub fn new(incoming: store::Incoming) -> Self {
        Self(Mutex::new(Some(incoming)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<store::Incoming>> {
        // As in `Lent`.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn arrived(&self) -> Vec<usize> {
        let arrived = self.lock().take();
        arrived.map_or(Vec::new(), |mut incoming| incoming.arrived())
    }
}

#[pymethods]
impl Incoming {
    #[getter]
    fn places(&self, py: Python<'_>) -> Vec<usize> {
        let of = |incoming: &store::Incoming| incoming.blocks().iter().map(|b| b.place).collect();
        py.detach(|| self.lock().as_ref().map(of).unwrap_or_default())
    }

    #[getter]
    fn offsets(&self, py: Python<'_>) -> Vec<u64> {
        let of = |incoming: &store::Incoming| incoming.blocks().iter().map(|b| b.slot.0).collect();
        py.detach(|| self.lock().as_ref().map(of).unwrap_or_default())
    }

    #[getter]
    fn slot_bytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.lock().as_ref().map_or(0, store::Incoming::slot_bytes))
    }

    fn give_up(&self, py: Python<'_>) {
        py.detach(|| {
            if let Some(incoming) = self.lock().as_ref() {
                incoming.give_up();
            }
        });
    }

    fn release(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

pub fn concat(digests: &[kvmesh_kvbm::Digest]) -> Vec<u8> {
    digests
        .iter()
        .flat_map(|digest| *digest.as_bytes())
        .collect()
}
