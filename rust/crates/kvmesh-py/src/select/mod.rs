//! `Selector`: placements for one model, for the event loop that owns it.

mod arguments;
mod external;
mod learned;
mod linked;
mod log;
mod outcome;

use kvmesh_index::HolderId;
use kvmesh_replay::{Answer, Changes, Driver, Input, Log};
use kvmesh_select::{
    Adopted, Config, NoWorker, PolicyName, Request, Selector, WorkerId, WorkerSpec,
};
use pyo3::{
    exceptions::{PyLookupError, PyRuntimeError, PyValueError},
    prelude::*,
    types::PyString,
};

use self::{external::judges, linked::Linked};
pub use self::{
    log::replay,
    outcome::{PyPlaced, PyRefused},
};
use crate::{error::to_py, index::PyPrefixIndex, integers::Hashes};

/// Places the requests of one model. Times are milliseconds from 0 on that never fall; workers, requests and leases are
/// ints. The same calls with the same seed bring about the same placements.
///
/// Calls must not overlap, whatever threads they come from. A call takes microseconds and keeps the GIL. What it placed or
/// refused, of requests held before too, it returns as a list of Placed and Refused.
#[pyclass(name = "Selector", module = "kvmesh.core")]
pub struct PySelector {
    driver: Driver<Linked>,
    /// External policies, by their numbers: names, and what judges.
    externals: Vec<(Py<PyString>, Py<PyAny>)>,
}

impl PySelector {
    /// What came of the calls since the last time.
    fn outcomes(&mut self, py: Python<'_>) -> PyResult<Vec<Py<PyAny>>> {
        outcome::take(py, &mut self.driver, &self.externals)
    }

    fn policy_of(&self, name: &str) -> PyResult<PolicyName> {
        self.driver
            .policy(name)
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }
}

#[pymethods]
impl PySelector {
    #[new]
    #[pyo3(signature = (
        index, *, block_tokens, seed, policy = "kv", temperature = 0.0, joint = true, gather_ms = None,
        lease_ttl_ms = 30_000.0, explained = 0, max_held = None, max_wait_ms = None, weights = None
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
        explained: usize,
        max_held: Option<usize>,
        max_wait_ms: Option<f64>,
        weights: Option<std::collections::BTreeMap<u64, f64>>,
    ) -> PyResult<Self> {
        let standard = Config::default();
        let admission = arguments::admission(max_held, max_wait_ms, weights);
        let config = Config {
            block_tokens: block_tokens.max(1),
            policy: arguments::policy(policy)?,
            temperature,
            joint,
            gather_ms: gather_ms.unwrap_or(standard.gather_ms),
            lease_ttl_ms,
            explained,
            admission,
            ..standard
        };
        let lookup = Linked::new(index.share());
        Ok(Self {
            driver: Driver::new(Selector::new(config), lookup, seed),
            externals: Vec::new(),
        })
    }

    // -- workers --

    /// Add a worker; returns its id. name is what logs call it; key is stable across restarts; role is "aggregated", "prefill" or
    /// "decode"; workers of one hardware_class are expected to be equally fast; prefill and decode workers of one
    /// pool are paired. prefill, decode and transfer are what it measured of itself: (tokens, tokens before
    /// them, ms), (streams, share of the pool in use, ms between tokens), (tokens, ms). offers are hashes of what it can do that
    /// not every worker can. Raises ValueError for
    /// another role.
    #[pyo3(signature = (
        key, role, *, hardware_class, blocks, pass_tokens, pool = 0, prefill = vec![], decode = vec![],
        transfer = vec![], offers = vec![], name = "", now = 0.0
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
        offers: Vec<u64>,
        name: &str,
        now: f64,
    ) -> PyResult<u64> {
        let spec = WorkerSpec {
            key,
            role: arguments::role(role)?,
            class: hardware_class,
            pool,
            blocks,
            pass_tokens,
            probe: arguments::probe(prefill, decode, transfer),
            offers,
        };
        let name = name.into();
        match self.driver.call(now, Input::AddWorker { name, spec }) {
            Answer::Worker(id) => Ok(id.raw()),
            other => Err(PyRuntimeError::new_err(format!("no worker but {other:?}"))),
        }
    }

    /// Forget a worker and its link. Leases on it live on, without weight.
    #[pyo3(signature = (worker, *, now = 0.0))]
    fn remove_worker(&mut self, worker: u64, now: f64) {
        let worker = WorkerId::from_raw(worker);
        self.driver.lookup.unlink(worker);
        self.driver.call(now, Input::RemoveWorker { worker });
    }

    /// Say which engine of the index a worker is; an earlier link ends.
    fn link(&mut self, worker: u64, holder: u32) {
        let id = WorkerId::from_raw(worker);
        self.driver.lookup.link(HolderId::from_raw(holder), id);
    }

    // -- requests --

    /// Place a request, or hold it. request is the caller's number for it, unique among those placed or held; blocks are
    /// the hashes of the prompt's whole blocks; session and tenant are hashes of their names, 0 for none; deadline is
    /// when its first token must be there; needs are what its workers must offer; name is what logs call the request. Raises LookupError when no worker can take it, ValueError for an unknown policy.
    #[pyo3(signature = (
        now, request, *, prompt_tokens, blocks, session = 0, tenant = 0, priority = 0, deadline = None,
        exclude = vec![], needs = vec![], policy = None, explain = false, name = ""
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
        needs: Vec<u64>,
        policy: Option<&str>,
        explain: bool,
        name: &str,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let policy = policy.map(|name| self.policy_of(name)).transpose()?;
        let request = Request {
            id: request,
            prompt_tokens,
            blocks: blocks.0.into(),
            session,
            tenant,
            priority,
            deadline,
            exclude: exclude.into_iter().map(WorkerId::from_raw).collect(),
            needs: needs.into(),
            policy,
            explain,
        };
        let name = name.into();
        match self.driver.call(now, Input::Submit { name, request }) {
            Answer::NoWorker => Err(PyLookupError::new_err(NoWorker.to_string())),
            _ => self.outcomes(py),
        }
    }

    /// The placement that a request would have, were it made now, as of submit; its lease is 0, and nothing is kept of it. Nothing
    /// waits. Raises LookupError when no worker can take it, ValueError for an unknown policy.
    #[pyo3(signature = (
        now, *, prompt_tokens, blocks, session = 0, tenant = 0, priority = 0, exclude = vec![], needs = vec![],
        policy = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn select(
        &mut self,
        py: Python<'_>,
        now: f64,
        prompt_tokens: u32,
        blocks: Hashes,
        session: u64,
        tenant: u64,
        priority: i32,
        exclude: Vec<u64>,
        needs: Vec<u64>,
        policy: Option<&str>,
    ) -> PyResult<PyPlaced> {
        let policy = policy.map(|name| self.policy_of(name)).transpose()?;
        let request = Request {
            prompt_tokens,
            blocks: blocks.0.into(),
            session,
            tenant,
            priority,
            exclude: exclude.into_iter().map(WorkerId::from_raw).collect(),
            needs: needs.into(),
            policy,
            ..Request::default()
        };
        match self.driver.select(now, &request) {
            Ok(placed) => Ok(PyPlaced::new(py, placed, &self.externals)),
            Err(error) => Err(PyLookupError::new_err(error.to_string())),
        }
    }

    /// Take a request back that is held; False when it is not held any more.
    #[pyo3(signature = (request, *, now = 0.0))]
    fn withdraw(&mut self, request: u64, now: f64) -> bool {
        self.driver.call(now, Input::Withdraw { request }) == Answer::Done
    }

    /// Take over a lease that another replica gave out, as if it had been placed here now; False when it is held already.
    /// cached are prompt tokens by tier; blocks the prompt's hashes, as long as it is not computed. A worker that
    /// is not there any more is not weighed.
    #[pyo3(signature = (
        now, lease, *, prefill, decode, prompt_tokens, cached, blocks, prefilled = false, output_tokens = 0
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn adopt(
        &mut self,
        now: f64,
        lease: u64,
        prefill: u64,
        decode: u64,
        prompt_tokens: u32,
        cached: [u32; 4],
        blocks: Hashes,
        prefilled: bool,
        output_tokens: u32,
    ) -> bool {
        let adopted = Adopted {
            lease,
            prefill: WorkerId::from_raw(prefill),
            decode: WorkerId::from_raw(decode),
            prompt_tokens,
            cached,
            blocks: blocks.0.into(),
            prefilled,
            output_tokens,
        };
        self.driver.call(now, Input::Adopt(adopted)) == Answer::Done
    }

    /// Account for how leases fare, and renew them: (lease, whether its prompt is computed, tokens generated, milliseconds of the
    /// time until its prompt was reported that went into moving its KV or 0, whether it ended). What they free is given out once, with
    /// all of it known. Also returns those that are not held.
    fn report(
        &mut self,
        py: Python<'_>,
        now: f64,
        reports: Vec<arguments::ReportTuple>,
    ) -> PyResult<(Vec<Py<PyAny>>, Vec<u64>)> {
        let reports = reports.into_iter().map(arguments::report).collect();
        let unknown = match self.driver.call(now, Input::Report { reports }) {
            Answer::NotHeld(leases) => leases,
            _ => Vec::new(),
        };
        Ok((self.outcomes(py)?, unknown))
    }

    /// End a lease. None for one that is not held.
    fn end(&mut self, py: Python<'_>, now: f64, lease: u64) -> PyResult<Option<Vec<Py<PyAny>>>> {
        let known = self.driver.call(now, Input::End { lease }) == Answer::Done;
        known.then(|| self.outcomes(py)).transpose()
    }

    /// Do what is due: call it at wakes_at, and about once a second. Also returns the leases that expired.
    fn tick(&mut self, py: Python<'_>, now: f64) -> PyResult<(Vec<Py<PyAny>>, Vec<u64>)> {
        let expired = match self.driver.call(now, Input::Tick) {
            Answer::Expired(leases) => leases,
            _ => Vec::new(),
        };
        Ok((self.outcomes(py)?, expired))
    }

    /// When tick is due, should nothing happen before; None when no request is held.
    fn wakes_at(&self, now: f64) -> Option<f64> {
        self.driver.selector().wakes_at(now)
    }

    // -- events --

    /// As PrefixIndex.apply, and takes note of what linked workers have on their devices.
    fn apply(&mut self, now: f64, batch: &[u8]) -> PyResult<()> {
        linked::apply(&mut self.driver, now, batch).map_err(to_py)
    }

    /// A worker's device has nothing, or nothing is known of it.
    #[pyo3(signature = (worker, *, now = 0.0))]
    fn cleared(&mut self, worker: u64, now: f64) {
        let worker = WorkerId::from_raw(worker);
        self.driver.call(now, Input::Cleared { worker });
    }

    // -- policies --

    /// Add a policy of the caller's: judge(request, candidates, partners) returns a cost for each candidate; what
    /// is not one finite float each is as if kv had judged. request: (prompt tokens, session, tenant, priority);
    /// candidates: (prefill, decode, live requests there, cached tokens by tier, terms). A pair's decode worker
    /// is chosen first, among candidates that are decode workers alone (partners is true).
    #[pyo3(signature = (name, judge, *, now = 0.0))]
    fn add_policy(
        &mut self,
        py: Python<'_>,
        name: Py<PyString>,
        judge: Py<PyAny>,
        now: f64,
    ) -> PyResult<()> {
        if self.externals.len() >= usize::from(u16::MAX) {
            return Err(PyValueError::new_err("too many policies"));
        }
        let known = name.to_str(py)?.to_owned();
        self.driver.add_policy(now, known, judges(py, &judge));
        self.externals.push((name, judge));
        Ok(())
    }

    /// Change what holds for requests from now on; what is None stays. by is who asked, for the log; shadows are policies
    /// that look on. Returns what that refused. Raises ValueError for an unknown policy; nothing is changed then.
    #[pyo3(signature = (
        now, *, by = "", policy = None, temperature = None, max_held = None, max_wait_ms = None,
        shadows = None
    ))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn set(
        &mut self,
        py: Python<'_>,
        now: f64,
        by: &str,
        policy: Option<String>,
        temperature: Option<f64>,
        max_held: Option<usize>,
        max_wait_ms: Option<f64>,
        shadows: Option<Vec<String>>,
    ) -> PyResult<Vec<Py<PyAny>>> {
        let changes = Changes {
            by: by.into(),
            policy,
            temperature,
            max_held,
            max_wait_ms,
            shadows,
        };
        let externals = &self.externals;
        let external = |name: &str| {
            let known = externals.iter().find(|known| known.0.bind(py) == name);
            known.map(|(_, judge)| judges(py, judge))
        };
        self.driver
            .set(now, changes, external)
            .map_err(|error| PyValueError::new_err(error.to_string()))?;
        self.outcomes(py)
    }

    /// The policy of requests that name none.
    #[getter]
    fn policy(&self, py: Python<'_>) -> Py<PyString> {
        outcome::policy_name(py, self.driver.selector().config().policy, &self.externals)
    }

    /// 0: the lowest cost wins; more softens the choice.
    #[getter]
    fn temperature(&self) -> f64 {
        self.driver.selector().config().temperature
    }

    // -- the log --

    /// Write every call from now on to files in a directory, which is this router's alone: model and run are said in them,
    /// epoch is the time 0 in seconds; a file of max_bytes is followed by another, and max_files are kept. Calls never wait for
    /// the disk. Raises OSError where the directory cannot be used.
    #[pyo3(signature = (directory, *, model, run, epoch, max_bytes, max_files, max_queued = 16 << 20))]
    #[allow(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn open_log(
        &mut self,
        directory: std::path::PathBuf,
        model: String,
        run: String,
        epoch: f64,
        max_bytes: u64,
        max_files: usize,
        max_queued: u64,
    ) -> PyResult<()> {
        let log = arguments::log(
            directory, model, run, epoch, max_bytes, max_files, max_queued,
        );
        self.driver.open_log(Log::open(log)?);
        Ok(())
    }

    /// Write what is queued, and nothing more; waits for the disk.
    fn close_log(&mut self, py: Python<'_>) {
        py.detach(|| self.driver.close_log());
    }

    /// What became of the log: lines written, lines dropped, bytes, files begun, the last failure. None without one.
    fn log_stats(&self) -> Option<(u64, u64, u64, u64, Option<String>)> {
        self.driver.log_stats().map(outcome::log_stats)
    }

    // -- state --

    /// What live leases take of a worker: requests, of them streaming, prompt tokens queued, blocks.
    fn slots(&self, worker: u64) -> (u32, u32, u64, u64) {
        outcome::slots(self.driver.selector().slots(WorkerId::from_raw(worker)))
    }

    /// The factor by which a worker is slower than its class, as far as that is believed, observations, and its mean
    /// relative error of late; None for an unknown one.
    fn pace(&self, worker: u64) -> Option<(f64, u64, f64)> {
        learned::pace(self.driver.selector(), worker)
    }

    /// The links by which a decode worker has received KV: (prefill worker, factor by which transfers take longer there, as far
    /// as it is believed, observations, mean relative error of late).
    fn links(&self, worker: u64) -> Vec<(u64, f64, u64, f64)> {
        learned::links(self.driver.selector(), worker)
    }

    /// What was learned: (hardware class, workers now, laws); a law is (name, [(coefficient, ms)], observations,
    /// mean relative error of late).
    fn rates(&self) -> Vec<learned::ClassTuple> {
        learned::rates(self.driver.selector())
    }

    /// How far predicted times to a computed prompt were off: (prompts, sum of actual minus predicted ms, sum of its
    /// absolute values, sum of actual ms).
    fn errors(&self) -> (u64, f64, f64, f64) {
        learned::errors(self.driver.selector().errors())
    }

    /// Live leases.
    #[getter]
    fn leases(&self) -> usize {
        self.driver.selector().leases().len()
    }

    /// Leases that ended by expiry.
    #[getter]
    fn expired(&self) -> u64 {
        self.driver.selector().leases().expired()
    }

    /// Requests held.
    #[getter]
    fn held(&self) -> usize {
        self.driver.selector().held()
    }

    /// Requests that workers' slots count and no live lease stands for; 0 unless one did not free what it took.
    #[getter]
    fn leaked(&self) -> u64 {
        self.driver.selector().leases().leaked()
    }

    /// Blocks that count as cached although no event said so yet, and the sum of their hashes modulo 2^64.
    #[getter]
    fn speculated(&self) -> (usize, u64) {
        self.driver.selector().speculated()
    }
}
