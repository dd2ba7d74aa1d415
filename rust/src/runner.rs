//! The scope and the leases that one runner holds until it is closed or collected.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use distguard_core::actor::Actor;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::occupancy::Occupancy;
use distguard_core::phases::{Access, Phase, RunnerId, Visit};
use distguard_core::scopes::{ScopeId, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use crate::convert;
use crate::errors::{make, to_python};
use crate::process::{communicators, forks, registry, scopes};
use crate::scope::Scope;
use crate::sync::lock;

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// A number that is no epoch of a registry.
const NEVER: u64 = u64::MAX;

/// Ties a runner to a scope and to the shared state it uses.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct RunnerHandle {
    name: Arc<str>,
    /// None is SGLang's default scope.
    scope: Option<Py<Scope>>,
    scope_id: ScopeId,
    leases: Mutex<Vec<(Key, LeaseId)>>,
    /// The registry's epoch at which the leases were good.
    good_at: AtomicU64,
    id: RunnerId,
    /// The runner whose weights it uses, if it is a draft.
    target: Option<RunnerId>,
    /// The name under which it takes turns with other runners on all ranks; None if it need not.
    turns: Option<String>,
    /// Whether it computes together with other ranks.
    ranks: bool,
    closed: AtomicBool,
    /// The thread whose forward writes its attention metadata and static buffers.
    forward: Arc<Mutex<Occupancy>>,
    /// The process that built it: `pid` for messages, `forks` (see `process::forks`) for checks.
    pid: u32,
    forks: u32,
}

impl RunnerHandle {
    pub fn id(&self) -> RunnerId {
        self.id
    }

    pub fn name_ref(&self) -> Arc<str> {
        self.name.clone()
    }

    pub fn scope_ref(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|scope| scope.clone_ref(py))
    }

    pub fn has_ranks(&self) -> bool {
        self.ranks
    }

    pub fn access(&self, phase: Phase) -> Access {
        Access {
            phase,
            runner: Some(self.id),
            target: self.target,
        }
    }

    /// Claims the runner for a forward of `actor`'s thread; the caller leaves the place.
    pub fn occupy_for_forward(
        &self,
        py: Python<'_>,
        actor: &Actor,
    ) -> PyResult<Arc<Mutex<Occupancy>>> {
        let entered = lock(&self.forward).enter(actor);
        self.or_in_use(py, entered, |name, other| {
            format!(
                "runner '{name}' is in a forward of thread {}: its attention metadata and static \
                 buffers hold one batch at a time. Call its forward from one thread at a time, or \
                 build one runner per thread",
                other.thread_name
            )
        })?;
        Ok(self.forward.clone())
    }

    fn leases(&self) -> MutexGuard<'_, Vec<(Key, LeaseId)>> {
        lock(&self.leases)
    }

    /// Raises with the text from `message` if another thread is in a place.
    fn or_in_use(
        &self,
        py: Python<'_>,
        entered: Result<usize, Actor>,
        message: impl FnOnce(&str, &Actor) -> String,
    ) -> PyResult<usize> {
        let other = match entered {
            Ok(depth) => return Ok(depth),
            Err(other) => other,
        };
        let details = PyDict::new(py);
        details.set_item("runner", &*self.name)?;
        details.set_item("holders", [other.to_string()])?;
        Err(make(
            py,
            "StateInUse",
            &message(&self.name, &other),
            &details,
        )?)
    }

    fn release_leases(&self) {
        let leases = std::mem::take(&mut *self.leases());
        for (_, lease) in leases {
            registry().release(lease);
        }
    }

    /// Runs no Python, because the destructor calls it.
    fn release(&self) -> bool {
        if self.closed.swap(true, Ordering::AcqRel) {
            return false;
        }
        // A forked child's registry is not the one that gave the leases.
        if self.forks == forks() {
            self.release_leases();
            scopes().with(|ledger| ledger.unbind_runner(self.scope_id, self.id));
        }
        true
    }
}

/// Leases all `keys` or none. A key that the scope has joined is leased at the joined generation,
/// so that state that was torn down since, or made anew for other scopes, is refused.
fn lease(
    py: Python<'_>,
    scope: ScopeId,
    keys: Vec<Key>,
    name: &str,
) -> PyResult<Vec<(Key, LeaseId)>> {
    let actor = convert::actor(py, Some(name.to_owned()))?;
    let at = scopes().with(|ledger| {
        keys.iter()
            .map(|key| ledger.joined(scope, key))
            .collect::<Vec<_>>()
    });
    let wanted: Vec<_> = keys.iter().zip(at).collect();
    let leased = registry().lease_each(&wanted, name, &actor);
    let ids = leased.map_err(|error| to_python(py, &error))?;
    Ok(keys.into_iter().zip(ids).collect())
}

#[pymethods]
impl RunnerHandle {
    #[new]
    #[pyo3(signature = (name, scope, keys, *, turns=None, ranks=false))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(
        py: Python<'_>,
        name: String,
        scope: Option<Bound<'_, Scope>>,
        keys: Vec<String>,
        turns: Option<String>,
        ranks: bool,
    ) -> PyResult<Self> {
        let keys: Vec<_> = keys
            .iter()
            .map(|key| convert::key(key))
            .collect::<PyResult<_>>()?;
        let scope_id = scope
            .as_ref()
            .map_or(DEFAULT, |scope| scope.get().scope_id());
        let leases = lease(py, scope_id, keys, &name)?;
        let id = RunnerId(NUMBERS.fetch_add(1, Ordering::Relaxed));
        let target = scopes().with(|ledger| ledger.bind_runner(scope_id, id));
        Ok(Self {
            name: name.into(),
            scope: scope.map(Bound::unbind),
            scope_id,
            leases: Mutex::new(leases),
            good_at: AtomicU64::new(NEVER),
            id,
            target,
            turns,
            ranks,
            closed: AtomicBool::new(false),
            forward: Arc::default(),
            pid: std::process::id(),
            forks: forks(),
        })
    }

    #[getter]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[getter]
    fn turns(&self) -> Option<&str> {
        self.turns.as_deref()
    }

    #[getter]
    fn scope(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|scope| scope.clone_ref(py))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Holds one more lease, on `key`.
    fn hold(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        let key = convert::key(key)?;
        self.check(py)?;
        let taken = lease(py, self.scope_id, vec![key], &self.name)?;
        self.leases().extend(taken);
        self.good_at.store(NEVER, Ordering::Release);
        if self.closed() {
            // Closed by another thread, which may have released the leases before these were added.
            self.release_leases();
        }
        Ok(())
    }

    /// Raises if the runner was closed, belongs to another process, or has a broken lease.
    pub fn check(&self, py: Python<'_>) -> PyResult<()> {
        // Read first: a change during the check of the leases is noticed by the next check.
        let epoch = registry().slots_epoch();
        let mine = self.forks == forks() && !self.closed();
        if mine && self.good_at.load(Ordering::Acquire) == epoch {
            return Ok(());
        }
        let (class, message) = if self.forks != forks() {
            let (pid, here) = (self.pid, std::process::id());
            (
                "ForkedError",
                format!(
                    "runner '{}' was built in process {pid}; this forked child ({here}) cannot \
                     use it. Build a runner here, or start the process with spawn",
                    self.name
                ),
            )
        } else if self.closed() {
            (
                "DistGuardError",
                format!("runner '{}' is closed; build a new one", self.name),
            )
        } else {
            let good = registry().check_leases(&self.leases());
            good.map_err(|error| to_python(py, &error))?;
            self.good_at.store(epoch, Ordering::Release);
            return Ok(());
        };
        let details = PyDict::new(py);
        details.set_item("runner", &*self.name)?;
        Err(make(py, class, &message, &details)?)
    }

    /// (thread, step) of other threads in steps of the runner or of its drafts.
    fn inside(&self) -> Vec<(String, Option<String>)> {
        let visits = registry().inside_of(self.id, convert::this_thread());
        let named = |visit: Visit| {
            let step = visit.step.map(|step| step.to_string());
            (visit.actor.thread_name.to_string(), step)
        };
        visits.into_iter().map(named).collect()
    }

    /// Claims the communicators of the runner's scope; `end_collectives` ends the claim. False if
    /// the calling thread has claimed them already.
    fn begin_collectives(&self, py: Python<'_>) -> PyResult<bool> {
        let me = convert::actor(py, Some(self.name.to_string()))?;
        let entered = communicators().entry(self.scope_id).or_default().enter(&me);
        let depth = self.or_in_use(py, entered, |name, other| {
            format!(
                "runner '{name}' uses communicators over which {other} is computing now: a runner \
                 and its drafts share them, and the collectives of two threads would be mixed up. \
                 Use such runners from one thread at a time"
            )
        })?;
        Ok(depth == 1)
    }

    fn end_collectives(&self) {
        let mut places = communicators();
        if places.get_mut(&self.scope_id).is_some_and(Occupancy::leave) {
            places.remove(&self.scope_id);
        }
    }

    /// Releases the leases and, if this was the scope's last runner, the scope's values.
    fn close(&self, py: Python<'_>) -> bool {
        let first = self.release();
        if let Some(scope) = self.scope.as_ref().filter(|_| first) {
            if scopes().with(|ledger| ledger.live(self.scope_id)) == 0 {
                scope.bind(py).get().clear(py);
            }
        }
        first
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { "closed" } else { "open" };
        format!("<RunnerHandle {:?} {state}>", self.name)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.scope
            .as_ref()
            .map_or(Ok(()), |scope| visit.call(scope))
    }
}

impl Drop for RunnerHandle {
    fn drop(&mut self) {
        self.release();
    }
}
