//! `Selector`: placements for one model, for the event loop that owns it.

mod external;
mod outcome;

use std::sync::Arc;

use kvmesh_core::Tier;
use kvmesh_index::{Change, HolderId, Matches, PrefixIndex};
use kvmesh_select::{
    Admission, Config, Context, Found, Lookup, PolicyName, Probe, Progress, Request, Role,
    Selector, WorkerId, WorkerSpec,
};
use pyo3::{
    exceptions::{PyLookupError, PyValueError},
    prelude::*,
    types::PyString,
};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rustc_hash::FxHashMap;

pub use self::outcome::{PyPlaced, PyRefused};
use self::{external::External, outcome::Outcomes};
use crate::{error::to_py, index::PyPrefixIndex, integers::Hashes};

/// What is known of one law: its name, coefficients by name, observations, mean relative error.
type LawTuple = (&'static str, Vec<(&'static str, f64)>, u64, f64);

/// The prefix index with the selector's names for its engines.
struct Linked {
    index: Arc<PrefixIndex>,
    workers: FxHashMap<HolderId, WorkerId>,
    matches: Matches,
}

impl Lookup for Linked {
    fn matches(&mut self, blocks: &[u64], found: &mut Vec<Found>) {
        self.index.matches(blocks, &mut self.matches);
        let named = |hit: kvmesh_index::Match| {
            Some(Found {
                worker: *self.workers.get(&hit.engine)?,
                depths: hit.depths,
            })
        };
        found.extend(self.matches.iter().filter_map(named));
    }
}

/// Places the requests of one model. Times are milliseconds from 0 on that never fall; workers, requests and leases are
/// ints. The same calls with the same seed bring about the same placements.
///
/// Calls must not overlap, whatever threads they come from. A call takes microseconds and keeps the GIL. What it placed or
/// refused, of requests held before too, it returns as a list of Placed and Refused.
#[pyclass(name = "Selector", module = "kvmesh.core")]
pub struct PySelector {
    selector: Selector,
    lookup: Linked,
    chance: ChaCha8Rng,
    /// Names of external policies, by their numbers.
    externals: Vec<Py<PyString>>,
    outcomes: Outcomes,
}

impl PySelector {
    fn with<R>(&mut self, now: f64, what: impl FnOnce(&mut Selector, &mut Context<'_>) -> R) -> R {
        let mut context = Context {
            now,
            lookup: &mut self.lookup,
            chance: &mut self.chance,
            placed: &mut self.outcomes.placed,
            refused: &mut self.outcomes.refused,
        };
        what(&mut self.selector, &mut context)
    }

    fn outcomes(&mut self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        self.outcomes.take(py, &self.externals)
    }

    fn policy_of(&self, py: Python<'_>, name: &str) -> PyResult<PolicyName> {
        let mut externals = self.externals.iter();
        match externals.position(|known| known.bind(py) == name) {
            Some(number) => Ok(PolicyName::External(number as u16)),
            None => name
                .parse()
                .map_err(|error| PyValueError::new_err(format!("{error}"))),
        }
    }
}

#[pymethods]
impl PySelector {
    #[new]
    #[pyo3(signature = (
        index, *, block_tokens, seed, policy = "kv", temperature = 0.0, joint = true, gather_ms = None,
        lease_ttl_ms = 30_000.0, max_held = None, max_wait_ms = None, weights = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        index: &PyPrefixIndex,
        block_tokens: u32,
        seed: u64,
        policy: &str,
        temperature: f64,
        joint: bool,
        gather_ms: Option<f64>,
        lease_ttl_ms: f64,
        max_held: Option<usize>,
        max_wait_ms: Option<f64>,
        weights: Option<std::collections::BTreeMap<u64, f64>>,
    ) -> PyResult<Self> {
        let standard = Config::default();
        let admission = Admission {
            max_held: max_held.unwrap_or(standard.admission.max_held),
            max_wait_ms: max_wait_ms.unwrap_or(standard.admission.max_wait_ms),
            weights: weights.unwrap_or_default(),
            ..standard.admission
        };
        let policy: PolicyName = policy
            .parse()
            .map_err(|error| PyValueError::new_err(format!("{error}")))?;
        let config = Config {
            block_tokens: block_tokens.max(1),
            policy,
            temperature,
            joint,
            gather_ms: gather_ms.unwrap_or(standard.gather_ms),
            lease_ttl_ms,
            admission,
            ..standard
        };
        Ok(Self {
            selector: Selector::new(config),
            lookup: Linked {
                index: index.share(),
                workers: FxHashMap::default(),
                matches: Matches::new(),
            },
            chance: ChaCha8Rng::seed_from_u64(seed),
            externals: Vec::new(),
            outcomes: Outcomes::default(),
        })
    }

    // -- workers --

    /// Add a worker; returns its id. key is stable across restarts; role is "aggregated", "prefill" or
    /// "decode"; workers of one hardware_class are expected to be equally fast; prefill and decode workers of one
    /// pool are paired. prefill, decode and transfer are what it measured of itself: (tokens, tokens before
    /// them, ms), (streams, share of the pool in use, ms between tokens), (tokens, ms). Raises ValueError for
    /// another role.
    #[pyo3(signature = (
        key, role, *, hardware_class, blocks, pass_tokens, pool = 0, prefill = vec![], decode = vec![],
        transfer = vec![]
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn add_worker(
        &mut self,
        key: u64,
        role: &str,
        hardware_class: String,
        blocks: u32,
        pass_tokens: u32,
        pool: u32,
        prefill: Vec<(u32, u32, f64)>,
        decode: Vec<(u32, f64, f64)>,
        transfer: Vec<(u32, f64)>,
    ) -> PyResult<u64> {
        let role = match role {
            "aggregated" => Role::Aggregated,
            "prefill" => Role::Prefill,
            "decode" => Role::Decode,
            _ => return Err(PyValueError::new_err(format!("unknown role `{role}`"))),
        };
        let spec = WorkerSpec {
            key,
            role,
            class: hardware_class,
            pool,
            blocks,
            pass_tokens,
            probe: Probe {
                prefill,
                decode,
                transfer,
            },
        };
        Ok(self.selector.add_worker(&spec).raw())
    }

    /// Forget a worker and its link. Leases on it live on, without weight.
    fn remove_worker(&mut self, worker: u64) {
        let id = WorkerId::from_raw(worker);
        self.lookup.workers.retain(|_, linked| *linked != id);
        self.selector.remove_worker(id);
    }

    /// Say which engine of the index a worker is; an earlier link ends.
    fn link(&mut self, worker: u64, holder: u32) {
        let id = WorkerId::from_raw(worker);
        self.lookup.workers.retain(|_, linked| *linked != id);
        self.lookup.workers.insert(HolderId::from_raw(holder), id);
    }

    // -- requests --

    /// Place a request, or hold it. request is the caller's number for it, unique among those placed or held; blocks are
    /// the hashes of the prompt's whole blocks; session and tenant are hashes of their names, 0 for none; deadline is
    /// when its first token must be there. Raises LookupError when no worker can take it, ValueError for an unknown policy.
    #[pyo3(signature = (
        now, request, *, prompt_tokens, blocks, session = 0, tenant = 0, priority = 0, deadline = None,
        exclude = vec![], policy = None, explain = false
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn submit(
        &mut self,
        py: Python<'_>,
        now: f64,
        request: u64,
        prompt_tokens: u32,
        blocks: Hashes,
        session: u64,
        tenant: u64,
        priority: i32,
        deadline: Option<f64>,
        exclude: Vec<u64>,
        policy: Option<&str>,
        explain: bool,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let policy = policy.map(|name| self.policy_of(py, name)).transpose()?;
        let wanted = Request {
            id: request,
            prompt_tokens,
            blocks: blocks.0.into(),
            session,
            tenant,
            priority,
            deadline,
            exclude: exclude.into_iter().map(WorkerId::from_raw).collect(),
            policy,
            explain,
        };
        self.with(now, |selector, context| selector.submit(wanted, context))
            .map_err(|error| PyLookupError::new_err(error.to_string()))?;
        self.outcomes(py)
    }

    /// Take a request back that is held; False when it is not held any more.
    fn withdraw(&mut self, request: u64) -> bool {
        self.selector.withdraw(request)
    }

    /// Account for a lease's progress and renew it. transfer_ms of the time until its prompt was reported went
    /// into moving its KV, 0 if that is not known. None for a lease that is not held.
    #[pyo3(signature = (now, lease, *, prefilled = false, output_tokens = 0, transfer_ms = 0.0))]
    fn progress(
        &mut self,
        py: Python<'_>,
        now: f64,
        lease: u64,
        prefilled: bool,
        output_tokens: u32,
        transfer_ms: f64,
    ) -> PyResult<Option<Vec<Py<PyAny>>>> {
        let progress = Progress {
            prefilled,
            output_tokens,
        };
        let known = self.with(now, |selector, context| {
            selector.progress_moved(lease, progress, transfer_ms, context)
        });
        known.then(|| self.outcomes(py)).transpose()
    }

    /// End a lease. None for one that is not held.
    fn end(&mut self, py: Python<'_>, now: f64, lease: u64) -> PyResult<Option<Vec<Py<PyAny>>>> {
        let known = self.with(now, |selector, context| selector.end(lease, context));
        known.then(|| self.outcomes(py)).transpose()
    }

    /// Do what is due: call it at wakes_at, and about once a second. Also returns the leases that expired.
    fn tick(&mut self, py: Python<'_>, now: f64) -> PyResult<(Vec<Py<PyAny>>, Vec<u64>)> {
        let expired = self.with(now, |selector, context| selector.tick(context));
        Ok((self.outcomes(py)?, expired))
    }

    /// When tick is due, should nothing happen before; None when no request is held.
    fn wakes_at(&self, now: f64) -> Option<f64> {
        self.selector.wakes_at(now)
    }

    // -- events --

    /// As PrefixIndex.apply, and takes note of what linked workers have on their devices.
    fn apply(&mut self, now: f64, batch: &[u8]) -> PyResult<()> {
        let Self {
            selector, lookup, ..
        } = self;
        let note = |holder: HolderId, change: &Change<'_>| {
            let Some(&worker) = lookup.workers.get(&holder) else {
                return;
            };
            match *change {
                Change::Stored(Tier::Device, _, hashes) => selector.stored(worker, hashes),
                Change::Removed(Tier::Device, hashes) => selector.removed(now, worker, hashes),
                Change::Cleared(None | Some(Tier::Device)) => selector.cleared(worker),
                _ => {}
            }
        };
        lookup.index.apply_noting(batch, note).map_err(to_py)
    }

    /// A worker's device has nothing, or nothing is known of it.
    fn cleared(&mut self, worker: u64) {
        self.selector.cleared(WorkerId::from_raw(worker));
    }

    // -- policies --

    /// Add a policy of the caller's: judge(request, candidates, partners) returns a cost for each candidate; what
    /// is not one finite float each is as if kv had judged. request: (prompt tokens, session, tenant, priority);
    /// candidates: (prefill, decode, live requests there, cached tokens by tier, terms). A pair's decode worker
    /// is chosen first, among candidates that are decode workers alone (partners is true).
    fn add_policy(&mut self, name: Py<PyString>, judge: Py<PyAny>, py: Python<'_>) -> PyResult<()> {
        let number = u16::try_from(self.externals.len())
            .map_err(|_| PyValueError::new_err("too many policies"))?;
        self.selector.add_policy(
            number,
            Box::new(External::new(judge.clone_ref(py), false)),
            Box::new(External::new(judge, true)),
        );
        self.externals.push(name);
        Ok(())
    }

    /// The policy of requests that name none. Raises ValueError for one that is not known.
    #[getter]
    fn policy(&self, py: Python<'_>) -> Py<PyString> {
        outcome::policy_name(py, self.selector.config().policy, &self.externals)
    }

    #[setter]
    fn set_policy(&mut self, py: Python<'_>, name: &str) -> PyResult<()> {
        let policy = self.policy_of(py, name)?;
        self.selector.set_policy(policy);
        Ok(())
    }

    /// 0: the lowest cost wins; more softens the choice.
    #[getter]
    fn temperature(&self) -> f64 {
        self.selector.config().temperature
    }

    #[setter]
    fn set_temperature(&mut self, temperature: f64) {
        self.selector.set_temperature(temperature);
    }

    // -- state --

    /// What live leases take of a worker: requests, of them streaming, prompt tokens queued, blocks.
    fn slots(&self, worker: u64) -> (u32, u32, u64, u64) {
        let slots = self.selector.slots(WorkerId::from_raw(worker));
        (
            slots.requests,
            slots.streams,
            slots.queued_tokens,
            slots.blocks,
        )
    }

    /// The factor by which a worker is slower than its class; None for an unknown one.
    fn slowness(&self, worker: u64) -> Option<f64> {
        self.selector.slowness(WorkerId::from_raw(worker))
    }

    /// What was learned: (hardware class, workers now, laws); a law is (name, [(coefficient, ms)], observations,
    /// mean relative error of late).
    fn rates(&self) -> Vec<(String, usize, Vec<LawTuple>)> {
        let law = |law: kvmesh_select::Law| {
            (
                law.name,
                law.coefficients,
                law.quality.count,
                law.quality.error,
            )
        };
        let rates = self.selector.rates().into_iter();
        rates
            .map(|(class, workers, laws)| {
                (
                    class.to_owned(),
                    workers,
                    laws.into_iter().map(law).collect(),
                )
            })
            .collect()
    }

    /// How far predicted times to a computed prompt were off: (prompts, sum of actual minus predicted ms, sum of its
    /// absolute values, sum of actual ms).
    fn errors(&self) -> (u64, f64, f64, f64) {
        let errors = self.selector.errors();
        (
            errors.count,
            errors.bias_ms,
            errors.absolute_ms,
            errors.actual_ms,
        )
    }

    /// Live leases.
    #[getter]
    fn leases(&self) -> usize {
        self.selector.leases().len()
    }

    /// Leases that ended by expiry.
    #[getter]
    fn expired(&self) -> u64 {
        self.selector.leases().expired()
    }

    /// Requests held.
    #[getter]
    fn held(&self) -> usize {
        self.selector.held()
    }

    /// Leases whose blocks count as cached although no event said so yet.
    #[getter]
    fn speculative(&self) -> usize {
        self.selector.speculative()
    }
}
