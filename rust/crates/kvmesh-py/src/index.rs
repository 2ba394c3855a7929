//! `PrefixIndex`: which worker holds which block, in which tier.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kvmesh_core::{Result, Tier};
use kvmesh_index::{HolderId, Matches, PrefixIndex};
use numpy::{IntoPyArray, PyArray1, PyReadwriteArray1, PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::{
    exceptions::PyValueError,
    prelude::*,
    types::{PyBytes, PyDict},
};

use crate::{
    answer::Answer,
    error::to_py,
    integers::{Hash, Hashes},
};

thread_local! {
    /// The last answer of this thread, kept for its memory.
    static MATCHES: RefCell<Matches> = RefCell::new(Matches::new());
}

/// Which holder (engine or store) has which block of KV, in which tier.
///
/// An engine has a device tier; a store with a node has that node's host and nvme tiers and a network tier; a store
/// without one has a network tier. An engine sees its own device, its node's host and nvme, and every
/// network tier. Membership of (holder, tier, hash) alone decides a match.
///
/// max_bytes caps the index's memory: at the cap the least recently matched blocks are forgotten and
/// counted, so it may report too little, never too much. None for no cap.
///
/// Hashes are lists of ints, uint64 arrays, or int64 arrays in two's complement. Thread-safe; every method
/// releases the GIL. Methods that take an id raise KeyError once that holder was dropped.
#[pyclass(name = "PrefixIndex", module = "kvmesh.core", frozen)]
pub struct PyPrefixIndex {
    index: Arc<PrefixIndex>,
    /// What the last match answered.
    answer: Mutex<Answer>,
}

impl PyPrefixIndex {
    fn with(index: PrefixIndex) -> Self {
        Self {
            index: Arc::new(index),
            answer: Mutex::default(),
        }
    }

    /// The index itself.
    pub fn share(&self) -> Arc<PrefixIndex> {
        Arc::clone(&self.index)
    }

    fn last_answer(&self) -> MutexGuard<'_, Answer> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call<T: Send>(
        &self,
        py: Python<'_>,
        f: impl Send + FnOnce(&PrefixIndex) -> Result<T>,
    ) -> PyResult<T> {
        py.detach(|| f(&self.index)).map_err(to_py)
    }

    /// The thread's answer for `hashes`, handed to `read` with the GIL held again.
    fn matched<T>(
        &self,
        py: Python<'_>,
        hashes: &Hashes,
        read: impl FnOnce(&Matches) -> PyResult<T>,
    ) -> PyResult<T> {
        // Taken out while in use: `read` may run Python code that matches again.
        let mut matches = MATCHES.take();
        py.detach(|| self.index.matches(&hashes.0, &mut matches));
        let answer = read(&matches);
        MATCHES.set(matches);
        answer
    }
}

#[pymethods]
impl PyPrefixIndex {
    #[new]
    #[pyo3(signature = (max_bytes = None))]
    fn new(max_bytes: Option<usize>) -> Self {
        Self::with(PrefixIndex::new(max_bytes))
    }

    /// Add an engine, on a node whose stores it sees. Returns its id. Raises ValueError when the
    /// name is in use or 4,096 holders are there.
    #[pyo3(signature = (name, node = None))]
    fn add_engine(&self, py: Python<'_>, name: &str, node: Option<&str>) -> PyResult<u32> {
        self.call(py, |index| index.add_engine(name, node).map(HolderId::get))
    }

    /// Add a store, on a node, or without one for the network tier. Returns its id. Raises
    /// ValueError when the name is in use or 4,096 holders are there.
    #[pyo3(signature = (name, node = None))]
    fn add_store(&self, py: Python<'_>, name: &str, node: Option<&str>) -> PyResult<u32> {
        self.call(py, |index| index.add_store(name, node).map(HolderId::get))
    }

    /// Record that a holder has these blocks in a tier. parent, the block before the first, is a
    /// hint for compression. Raises ValueError for a tier that such a holder does not have.
    #[pyo3(signature = (id, hashes, parent = None, tier = "device"))]
    fn store(
        &self,
        py: Python<'_>,
        id: u32,
        hashes: Hashes,
        parent: Option<Hash>,
        tier: &str,
    ) -> PyResult<()> {
        self.call(py, |index| {
            let parent = parent.map(|parent| parent.0);
            index.store(HolderId::from_raw(id), &hashes.0, parent, tier.parse()?)
        })
    }

    /// Record that a holder no longer has these blocks in a tier. Unknown ones are ignored.
    #[pyo3(signature = (id, hashes, tier = "device"))]
    fn remove(&self, py: Python<'_>, id: u32, hashes: Hashes, tier: &str) -> PyResult<()> {
        self.call(py, |index| {
            index.remove(HolderId::from_raw(id), &hashes.0, tier.parse()?)
        })
    }

    /// Record that a holder has nothing in a tier, or in any tier (None).
    #[pyo3(signature = (id, tier = None))]
    fn clear(&self, py: Python<'_>, id: u32, tier: Option<&str>) -> PyResult<()> {
        self.call(py, |index| {
            index.clear(HolderId::from_raw(id), tier.map(str::parse).transpose()?)
        })
    }

    /// Forget a holder, its blocks and its id.
    fn drop(&self, py: Python<'_>, id: u32) -> PyResult<()> {
        self.call(py, |index| index.drop_holder(HolderId::from_raw(id)))
    }

    /// Engines that see the first block of a prompt: {engine id: (device, host, nvme, network)}.
    ///
    /// The four depths count leading blocks, each of which the engine sees on its device; on device or
    /// host; on device, host or nvme; in any tier. hashes: the prompt's blocks from its start.
    fn r#match<'py>(&self, py: Python<'py>, hashes: Hashes) -> PyResult<Bound<'py, PyDict>> {
        self.matched(py, &hashes, |matches| {
            // Taken out while in use: a collection of garbage may run Python code that matches again.
            let mut answer = std::mem::take(&mut *self.last_answer());
            let dict = answer.update(py, matches)?;
            *self.last_answer() = answer;
            Ok(dict)
        })
    }

    /// As match, into arrays of the caller's: fills the first n rows of engines (uint32, 1-D, ids) and depths
    /// (uint32, rows of 4) and returns n. Only hashes are copied. Raises ValueError when more engines were
    /// found than there are rows (stats()["engines"] are always enough).
    fn match_into(
        &self,
        py: Python<'_>,
        hashes: Hashes,
        mut engines: PyReadwriteArray1<'_, u32>,
        mut depths: PyReadwriteArray2<'_, u32>,
    ) -> PyResult<usize> {
        let width = depths.shape()[1];
        self.matched(py, &hashes, |matches| {
            let (engines, depths) = (engines.as_slice_mut()?, depths.as_slice_mut()?);
            if width != 4 {
                return Err(PyValueError::new_err("depths must have rows of 4"));
            }
            let rows = engines.len().min(depths.len() / 4);
            if matches.len() > rows {
                let error = format!("need {} rows, got {rows}", matches.len());
                return Err(PyValueError::new_err(error));
            }
            let mut rows = engines.iter_mut().zip(depths.chunks_exact_mut(4));
            matches.iter().for_each(|found| {
                if let Some((engine, depths)) = rows.next() {
                    *engine = found.engine.get();
                    depths.copy_from_slice(&found.depths);
                }
            });
            Ok(matches.len())
        })
    }

    /// Apply one serialized kvmesh.v1.KvEventBatch to the holder it names, in order, whole or not at all. Its
    /// sequence number is the caller's business; changes in tiers that the holder cannot have are skipped.
    /// Raises ValueError for bytes that are no batch or whose columns do not add up, KeyError for a
    /// holder that was not added.
    fn apply(&self, py: Python<'_>, batch: &[u8]) -> PyResult<()> {
        self.call(py, |index| index.apply(batch))
    }

    /// The whole state as bytes, holders and their ids included, at one moment. Writers wait meanwhile.
    fn snapshot<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes = py.detach(|| self.index.snapshot());
        PyBytes::new(py, &bytes)
    }

    /// An index with what snapshot wrote, every holder under its id; what does not fit under max_bytes is
    /// forgotten. Raises ValueError for bytes that are damaged or of another version.
    #[staticmethod]
    #[pyo3(signature = (bytes, max_bytes = None))]
    fn restore(py: Python<'_>, bytes: &[u8], max_bytes: Option<usize>) -> PyResult<Self> {
        py.detach(|| PrefixIndex::restore(bytes, max_bytes))
            .map(Self::with)
            .map_err(to_py)
    }

    /// (count, sum modulo 2**128) over the blocks the index knows a holder to have in a tier. Equal
    /// sets have equal digests, whatever the order in which they came to be.
    #[pyo3(signature = (id, tier = "device"))]
    fn digest(&self, py: Python<'_>, id: u32, tier: &str) -> PyResult<(u64, u128)> {
        self.call(py, |index| {
            let digest = index.digest(HolderId::from_raw(id), tier.parse::<Tier>()?)?;
            Ok((digest.count, digest.sum))
        })
    }

    /// Blocks of a holder in a tier that were forgotten at the cap since it was last cleared: at most so many that it
    /// has are not in the index. One that was forgotten twice counts twice.
    #[pyo3(signature = (id, tier = "device"))]
    fn forgotten(&self, py: Python<'_>, id: u32, tier: &str) -> PyResult<u64> {
        self.call(py, |index| {
            index.forgotten(HolderId::from_raw(id), tier.parse::<Tier>()?)
        })
    }

    /// The blocks the index knows a holder to have in a tier, as uint64, in no order to rely on; blocks stored
    /// as one chain mostly lie together. Reads the whole index.
    #[pyo3(signature = (id, tier = "device"))]
    fn blocks<'py>(
        &self,
        py: Python<'py>,
        id: u32,
        tier: &str,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let blocks = self.call(py, |index| {
            index.blocks(HolderId::from_raw(id), tier.parse::<Tier>()?)
        })?;
        Ok(blocks.into_pyarray(py))
    }

    /// Sizes now: holders, engines, blocks (distinct), held (holder, tier, block triples), runs,
    /// bytes, max_bytes (None for no cap), forgotten (blocks, since the start, each counted once; `forgotten`
    /// tells them by holder).
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.index.stats());
        let answer = PyDict::new(py);
        answer.set_item("holders", stats.holders)?;
        answer.set_item("engines", stats.engines)?;
        answer.set_item("blocks", stats.blocks)?;
        answer.set_item("held", stats.held)?;
        answer.set_item("runs", stats.runs)?;
        answer.set_item("bytes", stats.bytes)?;
        answer.set_item("max_bytes", stats.max_bytes)?;
        answer.set_item("forgotten", stats.forgotten)?;
        Ok(answer)
    }
}
