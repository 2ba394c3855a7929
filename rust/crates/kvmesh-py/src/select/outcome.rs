//! What became of requests, for Python.

use kvmesh_replay::{Driver, LogStats};
use kvmesh_select::{Candidate, Lookup, Placed, PolicyName, Refused, Shadowed, Slots};
use pyo3::{intern, prelude::*, types::PyString};

/// (policy, prefill worker, decode worker, its cost and time to the first token, those of the placement that was made).
type ShadowTuple = (Py<PyString>, u64, u64, f64, f64, f64, f64);

/// (prefill worker, decode worker, cached tokens by tier, the policy's cost, terms).
type CandidateTuple = (u64, u64, [u32; 4], f64, [f64; 8]);

/// A placement that was made; an aggregated worker is both prefill and decode. Times in milliseconds.
#[pyclass(name = "Placed", module = "kvmesh.core", frozen)]
pub struct PyPlaced {
    placed: Placed,
    /// The policy that chose.
    #[pyo3(get)]
    policy: Py<PyString>,
    /// Names of the shadows' policies.
    shadows: Vec<Py<PyString>>,
}

impl PyPlaced {
    pub fn new(py: Python<'_>, placed: Placed, externals: &[(Py<PyString>, Py<PyAny>)]) -> Self {
        let policy = policy_name(py, placed.policy, externals);
        let shadows = placed.shadows.iter();
        let shadows = shadows
            .map(|shadow| policy_name(py, shadow.policy, externals))
            .collect();
        Self {
            placed,
            policy,
            shadows,
        }
    }
}

#[pymethods]
impl PyPlaced {
    /// The request's number.
    #[getter]
    fn request(&self) -> u64 {
        self.placed.request
    }

    /// Its lease; 0 only of what was selected and not placed.
    #[getter]
    fn lease(&self) -> u64 {
        self.placed.lease
    }

    /// Computes the prompt.
    #[getter]
    fn prefill(&self) -> u64 {
        self.placed.winner.prefill.raw()
    }

    /// Generates.
    #[getter]
    fn decode(&self) -> u64 {
        self.placed.winner.decode.raw()
    }

    /// Prompt tokens cached where it is computed: device, host, nvme, network, each without faster tiers.
    #[getter]
    fn cached(&self) -> [u32; 4] {
        self.placed.winner.cached
    }

    /// Predicted costs, in the order of TERMS.
    #[getter]
    fn terms(&self) -> [f64; 8] {
        self.placed.winner.terms.values()
    }

    /// Predicted time to the first token.
    #[getter]
    fn ttft_ms(&self) -> f64 {
        self.placed.winner.terms.ttft()
    }

    /// How long the request was held.
    #[getter]
    fn held_ms(&self) -> f64 {
        self.placed.held_ms
    }

    /// What policies that look on would have chosen: (policy, prefill, decode, its cost, its time to the first token, and both
    /// of the placement that was made, as that policy saw it).
    fn shadows(&self, py: Python<'_>) -> Vec<ShadowTuple> {
        let shadows = self.placed.shadows.iter().zip(&self.shadows);
        let tuple = |(one, policy): (&Shadowed, &Py<PyString>)| {
            (
                policy.clone_ref(py),
                one.choice.prefill.raw(),
                one.choice.decode.raw(),
                one.choice.terms.total(),
                one.choice.terms.ttft(),
                one.live.total(),
                one.live.ttft(),
            )
        };
        shadows.map(tuple).collect()
    }

    /// What it was chosen from, the cheapest first: all where the request asked, else the Selector's `explained`: (prefill, decode, cached, the policy's cost, terms).
    fn candidates(&self) -> Vec<CandidateTuple> {
        let Placed {
            candidates, costs, ..
        } = &self.placed;
        let tuple = |(one, &cost): (&Candidate, &f64)| {
            (
                one.prefill.raw(),
                one.decode.raw(),
                one.cached,
                cost,
                one.terms.values(),
            )
        };
        candidates.iter().zip(costs).map(tuple).collect()
    }
}

/// A request that will not be placed. Times in milliseconds.
#[pyclass(name = "Refused", module = "kvmesh.core", frozen, get_all)]
pub struct PyRefused {
    /// The request's number.
    request: u64,
    /// When to come back.
    retry_after_ms: f64,
    /// full, waited, deadline or no-worker.
    reason: &'static str,
    /// How long it was held.
    held_ms: f64,
}

impl From<Refused> for PyRefused {
    fn from(refused: Refused) -> Self {
        Self {
            request: refused.request,
            retry_after_ms: refused.retry_after_ms,
            reason: refused.reason.name(),
            held_ms: refused.held_ms,
        }
    }
}

/// Takes out what calls brought about, placements first.
pub fn take<L: Lookup>(
    py: Python<'_>,
    driver: &mut Driver<L>,
    externals: &[(Py<PyString>, Py<PyAny>)],
) -> PyResult<Vec<Py<PyAny>>> {
    let mut all = Vec::with_capacity(driver.placed.len() + driver.refused.len());
    for placed in driver.placed.drain(..) {
        let placed = PyPlaced::new(py, placed, externals);
        all.push(Py::new(py, placed)?.into_any());
    }
    for refused in driver.refused.drain(..) {
        all.push(Py::new(py, PyRefused::from(refused))?.into_any());
    }
    Ok(all)
}

pub fn policy_name(
    py: Python<'_>,
    policy: PolicyName,
    externals: &[(Py<PyString>, Py<PyAny>)],
) -> Py<PyString> {
    match policy {
        PolicyName::External(number) if usize::from(number) < externals.len() => {
            externals[usize::from(number)].0.clone_ref(py)
        }
        PolicyName::Kv => intern!(py, "kv").clone().unbind(),
        other => PyString::new(py, other.name()).unbind(),
    }
}

/// Requests, of them streaming, prompt tokens queued, blocks.
pub fn slots(slots: Slots) -> (u32, u32, u64, u64) {
    (
        slots.requests,
        slots.streams,
        slots.queued_tokens,
        slots.blocks,
    )
}

/// Lines written, lines dropped, bytes, files begun, the last failure.
pub fn log_stats(stats: LogStats) -> (u64, u64, u64, u64, Option<String>) {
    (
        stats.lines,
        stats.dropped,
        stats.bytes,
        stats.files,
        stats.error,
    )
}
