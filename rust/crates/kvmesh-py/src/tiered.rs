//! `TieredStore`: a store within one process.

use std::path::PathBuf;
use std::time::Duration;

use kvmesh_kvbm::Digest;
use kvmesh_kvbm::embedded::BlockStore;
use kvmesh_kvbm::store::{NvmeSettings, Settings};
use kvmesh_kvbm::tiers::ObjectSettings;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::kvbm::{
    PyObjects, chain, flow_dict, objects_dict, policy, stats_dict, tier_name, to_py,
};

/// What may be in object storage, unless it is said.
const REMOTE_BYTES: u64 = 1 << 40;

/// Tiers of this process alone.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct TieredStore(BlockStore);

#[pymethods]
impl TieredStore {
    #[new]
    #[pyo3(signature = (host_bytes, block_bytes, nvme_path = None, nvme_bytes = 0, remote = None, policy = "default", *,
                        shm_dir = PathBuf::from("/dev/shm"), nvme_bytes_per_day = None))]
    #[allow(clippy::too_many_arguments, reason = "mostly optional in Python")]
    fn new(
        py: Python<'_>,
        host_bytes: u64,
        block_bytes: u32,
        nvme_path: Option<PathBuf>,
        nvme_bytes: u64,
        remote: Option<Remote>,
        policy: &str,
        shm_dir: PathBuf,
        nvme_bytes_per_day: Option<u64>,
    ) -> PyResult<Self> {
        if nvme_path.is_some() != (nvme_bytes > 0) {
            let message = "an nvme tier needs both nvme_path and nvme_bytes";
            return Err(PyValueError::new_err(message));
        }
        let settings = Settings {
            policy: self::policy(policy)?,
            nvme: nvme_path.map(|dir| NvmeSettings {
                dir,
                bytes: nvme_bytes,
                bytes_per_day: nvme_bytes_per_day,
            }),
            objects: remote.map(Remote::settings).transpose()?,
            ..Settings::host(&shm_dir, host_bytes)
        };
        py.detach(|| BlockStore::new(&settings, block_bytes))
            .map(Self)
            .map_err(to_py)
    }

    fn put(&self, py: Python<'_>, digest: &[u8], data: PyBuffer<u8>) -> PyResult<bool> {
        let digest = one(digest)?;
        let bytes = contiguous(&data)?;
        // SAFETY: `data` keeps the memory alive, which is contiguous; callers do not write it during the call.
        let bytes = unsafe { std::slice::from_raw_parts(bytes.0, bytes.1) };
        py.detach(|| self.0.put(digest, bytes)).map_err(to_py)
    }

    fn get(
        &self,
        py: Python<'_>,
        digest: &[u8],
        out: PyBuffer<u8>,
    ) -> PyResult<Option<&'static str>> {
        let digest = one(digest)?;
        if out.readonly() {
            return Err(PyValueError::new_err("`out` cannot be written"));
        }
        let bytes = contiguous(&out)?;
        // SAFETY: `out` keeps the memory alive, which is contiguous and writable; callers do not touch it during the call.
        let bytes = unsafe { std::slice::from_raw_parts_mut(bytes.0, bytes.1) };
        let tier = py.detach(|| self.0.get(digest, bytes)).map_err(to_py)?;
        Ok(tier.map(tier_name))
    }

    fn contains(
        &self,
        py: Python<'_>,
        digests: Vec<Vec<u8>>,
    ) -> PyResult<Vec<Option<&'static str>>> {
        let digests: Vec<Digest> = digests.iter().map(|d| one(d)).collect::<PyResult<_>>()?;
        let tiers = py.detach(|| self.0.contains(&digests));
        Ok(tiers.into_iter().map(|tier| tier.map(tier_name)).collect())
    }

    fn pin(&self, py: Python<'_>, digest: &[u8]) -> PyResult<bool> {
        let digest = one(digest)?;
        Ok(py.detach(|| self.0.pin(digest)))
    }

    fn unpin(&self, py: Python<'_>, digest: &[u8]) -> PyResult<bool> {
        let digest = one(digest)?;
        Ok(py.detach(|| self.0.unpin(digest)))
    }

    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.flush()).map_err(to_py)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let store = self.0.store();
        let (tiers, flow, health) = py.detach(|| (store.stats(), store.flow(), store.health()));
        let values = PyDict::new(py);
        for (tier, stats) in tiers {
            values.set_item(tier_name(tier), stats_dict(py, &stats)?)?;
        }
        if let Some(health) = health {
            values.set_item("flow", flow_dict(py, &flow, &health)?)?;
        }
        if let Some(objects) = py.detach(|| store.object_flow()) {
            values.set_item("objects", objects_dict(py, &objects)?)?;
        }
        Ok(values)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }

    fn __enter__(this: Py<Self>) -> Py<Self> {
        this
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyTuple>) {
        self.close(py);
    }
}

/// Object storage by its URL alone, or with all there is to say of it.
#[derive(FromPyObject)]
enum Remote {
    Url(String),
    Options(PyObjects),
}

impl Remote {
    fn settings(self) -> PyResult<ObjectSettings> {
        match self {
            Self::Url(url) => Ok(ObjectSettings {
                url,
                endpoint: None,
                region: None,
                credentials: None,
                bytes: REMOTE_BYTES,
                timeout: Duration::from_secs(10),
                refresh: Duration::from_secs(300),
                writable: true,
            }),
            Self::Options(options) => options.settings(),
        }
    }
}

fn one(digest: &[u8]) -> PyResult<Digest> {
    match chain(digest)?[..] {
        [digest] => Ok(digest),
        _ => Err(PyValueError::new_err("a digest has 32 bytes")),
    }
}

/// Where a buffer's bytes lie.
fn contiguous(buffer: &PyBuffer<u8>) -> PyResult<(*mut u8, usize)> {
    if buffer.is_c_contiguous() {
        Ok((buffer.buf_ptr().cast(), buffer.len_bytes()))
    } else {
        Err(PyValueError::new_err("a buffer must be contiguous"))
    }
}
