//! `StoreServer`: a node's store, as the kvbm process holds it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use kvmesh_core::BlockHash;
use kvmesh_kvbm::control;
use kvmesh_kvbm::store::{NvmeSettings, PinError, ScrubSettings, Settings, Store};
use kvmesh_kvbm::tiers::{NamespaceId, Slot, TenantWeights, Tier};
use pyo3::exceptions::{PyLookupError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::network::{self, Incoming, Lent, Neighbours, PyNamespace, PyWanted};
use super::warming::Warming;
use super::{
    PyChange, PyHints, PyObjects, chain, changes, flow_dict, objects_dict, policy, scrubbed_dict,
    seconds, stats_dict, tier_name, to_py,
};
use crate::index::PyPrefixIndex;

/// The store of a node, served on the unix socket `socket`.
#[pyclass(module = "kvmesh.core", frozen)]
pub struct StoreServer(control::StoreServer);

impl StoreServer {
    fn store(&self) -> &Store {
        self.0.store()
    }

    fn namespace(&self, fields: PyNamespace) -> PyResult<NamespaceId> {
        let name = network::namespace(fields);
        (self.store().find(&name))
            .ok_or_else(|| PyValueError::new_err(format!("this store has no namespace {name:?}")))
    }

    fn tier(&self, name: &str) -> PyResult<Arc<dyn Tier>> {
        let named = |tier: &Arc<dyn Tier>| tier.kind().is_some_and(|kind| tier_name(kind) == name);
        let tiers = self.store().tiers();
        (tiers.into_iter().find(named))
            .ok_or_else(|| PyValueError::new_err(format!("this store has no tier {name:?}")))
    }
}

#[pymethods]
impl StoreServer {
    #[new]
    #[pyo3(signature = (socket, host_bytes, shm_dir, policy = "default", *, tenant_weights = None, nvme_path = None, nvme_bytes = 0,
                        nvme_bytes_per_day = None, objects = None, pin_bytes = None, scrub_bytes_per_s = None, scrub_pause_s = 60.0))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        py: Python<'_>,
        socket: PathBuf,
        host_bytes: u64,
        shm_dir: PathBuf,
        policy: &str,
        tenant_weights: Option<HashMap<String, f64>>,
        nvme_path: Option<PathBuf>,
        nvme_bytes: u64,
        nvme_bytes_per_day: Option<u64>,
        objects: Option<PyObjects>,
        pin_bytes: Option<u64>,
        scrub_bytes_per_s: Option<u64>,
        scrub_pause_s: f64,
    ) -> PyResult<Self> {
        let host = Settings::host(&shm_dir, host_bytes);
        let pause = seconds(scrub_pause_s)?;
        let settings = Settings {
            policy: self::policy(policy)?,
            tenant_weights: tenant_weights
                .map(TenantWeights::new)
                .transpose()
                .map_err(to_py)?,
            nvme: nvme_path.map(|dir| NvmeSettings {
                dir,
                bytes: nvme_bytes,
                bytes_per_day: nvme_bytes_per_day,
            }),
            objects: objects.map(PyObjects::settings).transpose()?,
            pin_bytes: pin_bytes.unwrap_or(host.pin_bytes),
            scrub: scrub_bytes_per_s.map(|bytes_per_s| ScrubSettings { bytes_per_s, pause }),
            ..host
        };
        let start = || control::StoreServer::start(&socket, Arc::new(Store::new(&settings)?));
        py.detach(start).map(Self).map_err(to_py)
    }

    #[getter]
    fn tiers(&self) -> Vec<&'static str> {
        let tiers = self.store().tiers();
        (tiers.iter())
            .filter_map(|tier| tier.kind().map(tier_name))
            .collect()
    }

    #[pyo3(signature = (tier = "host"))]
    fn stats<'py>(&self, py: Python<'py>, tier: &str) -> PyResult<Bound<'py, PyDict>> {
        let tier = self.tier(tier)?;
        stats_dict(py, &py.detach(|| tier.stats()))
    }

    fn tenant_bytes(&self, py: Python<'_>) -> HashMap<String, u64> {
        let held = py.detach(|| self.store().host().held_by_tenant());
        held.into_iter().collect()
    }

    fn flow<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let (flow, health) = py.detach(|| (self.store().flow(), self.store().health()));
        health
            .map(|health| flow_dict(py, &flow, &health))
            .transpose()
    }

    fn objects<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let flow = py.detach(|| self.store().object_flow());
        flow.map(|flow| objects_dict(py, &flow)).transpose()
    }

    fn latencies(&self, py: Python<'_>) -> Vec<super::PyLatency> {
        super::latencies(py.detach(|| self.store().latencies()))
    }

    /// What the scrubber has checked, tier by tier.
    fn scrubbed<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        scrubbed_dict(py, py.detach(|| self.store().scrubbed()))
    }

    #[getter]
    fn engines(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.engines())
    }

    #[pyo3(signature = (tier = None))]
    fn flush(&self, py: Python<'_>, tier: Option<&str>) -> PyResult<usize> {
        let tiers = match tier {
            Some(name) => vec![self.tier(name)?],
            None => self.store().tiers(),
        };
        // What all stores share is forgotten when it is named.
        let shared = |tier: &Arc<dyn Tier>| tier.kind().map(tier_name) == Some("network");
        let tiers = (tiers.into_iter()).filter(|of| tier.is_some() || !shared(of));
        let tiers: Vec<_> = tiers.collect();
        Ok(py.detach(|| tiers.iter().map(|tier| tier.flush()).sum()))
    }

    #[pyo3(signature = (within_s = None))]
    fn persist(&self, py: Python<'_>, within_s: Option<f64>) -> PyResult<()> {
        let within = within_s.map(seconds).transpose()?;
        py.detach(|| self.store().persist(within)).map_err(to_py)
    }

    fn hint(&self, py: Python<'_>, model: &str, hashes: Vec<u64>, hints: PyHints) {
        let blocks: Vec<BlockHash> = hashes.into_iter().map(BlockHash).collect();
        let hints = hints.into();
        py.detach(|| {
            for namespace in self.store().namespaces_of(model) {
                self.store().hint(namespace, &blocks, hints);
            }
        });
    }

    fn pin(
        &self,
        py: Python<'_>,
        tenant: &str,
        model: &str,
        digests: &[u8],
        ttl_s: f64,
    ) -> PyResult<(u64, usize, u64)> {
        let (blocks, time) = (chain(digests)?, seconds(ttl_s)?);
        let pinned = py.detach(|| self.store().pin(tenant, model, &blocks, time));
        match pinned {
            Ok(pinned) => Ok((pinned.receipt, pinned.blocks, pinned.bytes)),
            Err(error @ PinError::Absent) => Err(PyLookupError::new_err(error.to_string())),
            Err(error) => Err(PyValueError::new_err(error.to_string())),
        }
    }

    fn unpin(&self, py: Python<'_>, receipt: u64) -> bool {
        py.detach(|| self.store().unpin(receipt))
    }

    #[getter]
    fn pinned(&self, py: Python<'_>) -> (usize, u64) {
        py.detach(|| self.store().pinned())
    }

    fn prefetch(
        &self,
        py: Python<'_>,
        model: &str,
        digests: &[u8],
        hashes: Vec<u64>,
        within_s: f64,
    ) -> PyResult<(usize, usize)> {
        let (blocks, within) = (chain(digests)?, seconds(within_s)?);
        let hashes: Vec<BlockHash> = hashes.into_iter().map(BlockHash).collect();
        Ok(py.detach(|| {
            let store = self.store();
            let mut wished = (0, 0);
            for namespace in store.namespaces_of(model) {
                let named = store.digests(namespace, &hashes);
                let chain = if hashes.is_empty() { &blocks } else { &named };
                let found = store.prefetch(namespace, chain, within);
                wished = (wished.0 + found.here, wished.1 + found.coming);
            }
            wished
        }))
    }

    fn recall(&self, py: Python<'_>, model: &str, hashes: Vec<u64>, within_s: f64) -> PyResult<()> {
        let within = seconds(within_s)?;
        let hashes: Vec<BlockHash> = hashes.into_iter().map(BlockHash).collect();
        py.detach(|| {
            let store = self.store();
            for namespace in store.namespaces_of(model) {
                let known = store.digests(namespace, &hashes);
                store.recall(namespace, &known, &hashes, within);
            }
        });
        Ok(())
    }

    fn evict(&self, py: Python<'_>, tier: &str, model: &str, digests: &[u8]) -> PyResult<usize> {
        let (blocks, tier) = (chain(digests)?, self.tier(tier)?);
        let Some(kind) = tier.kind() else {
            return Ok(0);
        };
        Ok(py.detach(|| {
            let namespaces = self.store().namespaces_of(model).into_iter();
            namespaces
                .map(|namespace| self.store().evict(kind, namespace, &blocks))
                .sum()
        }))
    }

    fn locate(&self, py: Python<'_>, model: &str, digests: &[u8]) -> PyResult<Vec<PyLocated>> {
        let blocks = chain(digests)?;
        Ok(py.detach(|| {
            let namespaces = self.store().namespaces_of(model).into_iter();
            let located = namespaces.map(|namespace| {
                let name = self.store().name_of(namespace);
                let places = |block| {
                    let tiers = self.store().places_of(namespace, block);
                    tiers.into_iter().map(tier_name).collect()
                };
                let tiers = blocks.iter().map(places).collect();
                (
                    (name.model, name.revision, name.dtype, name.layout),
                    (name.rank, name.ranks),
                    tiers,
                )
            });
            located.collect()
        }))
    }

    #[pyo3(signature = (tier, after = None, limit = 64))]
    fn check(
        &self,
        py: Python<'_>,
        tier: &str,
        after: Option<u64>,
        limit: usize,
    ) -> PyResult<PyChecked> {
        let tier = self.tier(tier)?;
        let Some(kind) = tier.kind() else {
            return Ok((0, 0, Vec::new(), None));
        };
        let checked = py.detach(|| self.store().check(kind, after.map(Slot), limit));
        let checked = checked.map_err(to_py)?;
        let corrupt = checked.corrupt.into_iter();
        let bad = corrupt.map(|(tier, digest)| (tier_name(tier), digest.to_string()));
        Ok((
            checked.blocks,
            checked.bytes,
            bad.collect(),
            checked.next.map(|slot| slot.0),
        ))
    }

    #[pyo3(signature = (model, objects = None))]
    fn warming(
        &self,
        py: Python<'_>,
        model: &str,
        objects: Option<PyObjects>,
    ) -> PyResult<Warming> {
        let objects = objects.map(PyObjects::settings).transpose()?;
        let plan = py.detach(|| match &objects {
            Some(objects) => self.store().warming_from(model, objects),
            None => Ok(self.store().warming(model)),
        });
        plan.map(Warming::new).map_err(to_py)
    }

    fn hottest<'py>(
        &self,
        py: Python<'py>,
        model: &str,
        limit: usize,
    ) -> Vec<(PyNamespace, Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let runs = py.detach(|| {
            let runs = self.store().hottest(model, limit).into_iter();
            let named = runs.map(|(id, parent, run)| {
                let parent: Vec<_> = parent.into_iter().collect();
                (network::fields(self.store().name_of(id)), parent, run)
            });
            named.collect::<Vec<_>>()
        });
        let bytes = |digests: &[_]| PyBytes::new(py, &network::concat(digests));
        (runs.into_iter())
            .map(|(name, parent, run)| (name, bytes(&parent), bytes(&run)))
            .collect()
    }

    fn open(&self, py: Python<'_>, namespace: PyNamespace) -> PyResult<()> {
        let name = network::namespace(namespace);
        py.detach(|| self.store().open(&name))
            .map(drop)
            .map_err(to_py)
    }

    /// Blocks that fit into vacant room, of one size.
    fn room(&self, py: Python<'_>, namespace: PyNamespace) -> PyResult<u64> {
        py.detach(|| {
            let id = self.namespace(namespace)?;
            Ok(self.store().room(id))
        })
    }

    fn warm(&self, py: Python<'_>, warming: &Warming, blocks: usize) -> (u64, u64, u64) {
        let warmed = py.detach(|| self.store().warm(&mut warming.lock(), blocks));
        (warmed.brought, warmed.failed, warmed.to_come)
    }

    #[getter]
    fn arena(&self) -> (usize, u64) {
        let arena = self.store().host().arena();
        (arena.address(), arena.bytes())
    }

    #[getter]
    fn huge_bytes(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.store().host().arena().huge_bytes())
    }

    fn namespaces(&self, py: Python<'_>, model: &str) -> Vec<PyNamespace> {
        py.detach(|| {
            let ids = self.store().namespaces_of(model).into_iter();
            ids.map(|id| network::fields(self.store().name_of(id)))
                .collect()
        })
    }

    fn known<'py>(
        &self,
        py: Python<'py>,
        namespace: PyNamespace,
        hashes: Vec<u64>,
    ) -> Bound<'py, PyBytes> {
        let hashes: Vec<BlockHash> = hashes.into_iter().map(BlockHash).collect();
        let found = py.detach(|| {
            let id = self.store().find(&network::namespace(namespace));
            id.map(|id| network::concat(&self.store().digests(id, &hashes)))
        });
        PyBytes::new(py, &found.unwrap_or_default())
    }

    fn lend(
        &self,
        py: Python<'_>,
        namespace: PyNamespace,
        digests: &[u8],
    ) -> PyResult<Option<Lent>> {
        let (blocks, name) = (chain(digests)?, network::namespace(namespace));
        let lent = py.detach(|| self.store().lend(&name, &blocks));
        Ok(lent.map(Lent::new))
    }

    fn expect(
        &self,
        py: Python<'_>,
        namespace: PyNamespace,
        parent: &[u8],
        digests: &[u8],
    ) -> PyResult<Incoming> {
        let (parent, blocks) = (chain(parent)?, chain(digests)?);
        py.detach(|| {
            let id = self.namespace(namespace)?;
            let incoming = self.store().expect(id, parent.first(), &blocks);
            Ok(Incoming::new(incoming))
        })
    }

    fn arrived(&self, py: Python<'_>, incoming: &Incoming) -> Vec<usize> {
        py.detach(|| {
            let bad = incoming.arrived();
            self.store().stored();
            bad
        })
    }

    fn look_elsewhere(&self, py: Python<'_>, neighbours: &PyPrefixIndex) {
        let neighbours = Arc::new(Neighbours(neighbours.share()));
        py.detach(|| self.store().look_elsewhere(neighbours));
    }

    fn wanted<'py>(&self, py: Python<'py>, timeout_s: f64) -> PyResult<Vec<PyWanted<'py>>> {
        let timeout = seconds(timeout_s)?;
        let wanted = py.detach(|| {
            let wanted = self.store().wanted(timeout).into_iter();
            let named = wanted.map(|want| {
                let name = network::fields(self.store().name_of(want.namespace));
                (name, want)
            });
            named.collect::<Vec<_>>()
        });
        let bytes = |digests: &[_]| PyBytes::new(py, &network::concat(digests));
        let told = wanted.into_iter().map(|(name, want)| {
            let left = want.until.saturating_duration_since(Instant::now());
            let (parent, chain) = (bytes(want.parent.as_slice()), bytes(&want.chain));
            (want.number, name, parent, chain, left.as_secs_f64())
        });
        Ok(told.collect())
    }

    fn settle(&self, py: Python<'_>, number: u64) {
        py.detach(|| self.store().settle(number));
    }

    #[getter]
    fn wanted_total(&self, py: Python<'_>) -> (u64, u64) {
        py.detach(|| self.store().wanted_total())
    }

    fn bring(
        &self,
        py: Python<'_>,
        namespace: PyNamespace,
        parent: &[u8],
        digests: &[u8],
        within_s: f64,
    ) -> PyResult<()> {
        let (parent, blocks, within) = (chain(parent)?, chain(digests)?, seconds(within_s)?);
        py.detach(|| {
            let id = self.namespace(namespace)?;
            (self.store()).bring_remote(id, parent.first().copied(), &blocks, within);
            Ok(())
        })
    }

    #[pyo3(signature = (timeout_s, tier = "host"))]
    fn wait_changes(&self, py: Python<'_>, timeout_s: f64, tier: &str) -> PyResult<bool> {
        let (timeout, tier) = (seconds(timeout_s)?, self.tier(tier)?);
        Ok(py.detach(|| tier.journal().is_some_and(|journal| journal.wait(timeout))))
    }

    fn wake(&self) {
        for tier in self.store().tiers() {
            if let Some(journal) = tier.journal() {
                journal.wake();
            }
        }
    }

    #[pyo3(signature = (tier = "host"))]
    fn drain_changes(&self, py: Python<'_>, tier: &str) -> PyResult<Vec<PyChange>> {
        let tier = self.tier(tier)?;
        let drained = py.detach(|| {
            tier.journal()
                .map(|journal| journal.drain())
                .unwrap_or_default()
        });
        Ok(changes(drained))
    }

    #[pyo3(signature = (tier = "host"))]
    fn snapshot(&self, py: Python<'_>, tier: &str) -> PyResult<(Vec<PyChange>, Vec<PyChange>)> {
        let tier = self.tier(tier)?;
        let (pending, state) = py.detach(|| tier.snapshot());
        Ok((changes(pending), changes(state)))
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }
}

/// (model, revision, dtype, layout), (rank, ranks), and the tiers of each block.
type PyLocated = (
    (String, String, String, String),
    (u32, u32),
    Vec<Vec<&'static str>>,
);

/// Blocks, bytes, the tier and name of each bad one, and where to go on.
type PyChecked = (u64, u64, Vec<(&'static str, String)>, Option<u64>);
