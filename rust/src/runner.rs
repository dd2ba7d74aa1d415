//! What one runner holds: its scope and its leases, until it is closed or collected.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use distguard_core::actor::Actor;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::scopes::{ScopeId, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use crate::convert;
use crate::errors::{make, to_python};
use crate::process::{forks, registry, scopes};
use crate::scope::{self, Scope};
use crate::sync::lock;

/// Ties a runner to a scope and to the shared state it uses.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct RunnerHandle {
    name: String,
    /// None is SGLang's default scope.
    scope: Option<Py<Scope>>,
    scope_id: ScopeId,
    leases: Mutex<Vec<(Key, LeaseId)>>,
    /// Whether the ranks agree on the order in which it and others compute.
    ordered: bool,
    /// Who is inside a forward, and how many deep. Another thread's would mix with it.
    forwarding: Mutex<Option<(Actor, usize)>>,
    closed: AtomicBool,
    /// Which process built it, for people, and by `process::forks` for us.
    pid: u32,
    forks: u32,
}

impl RunnerHandle {
    fn leases(&self) -> MutexGuard<'_, Vec<(Key, LeaseId)>> {
        lock(&self.leases)
    }

    fn forwarding(&self) -> MutexGuard<'_, Option<(Actor, usize)>> {
        lock(&self.forwarding)
    }

    fn release_leases(&self) {
        let leases = std::mem::take(&mut *self.leases());
        for (_, lease) in leases {
            registry().release(lease);
        }
    }

    /// Runs no Python: it is what the destructor does.
    fn release(&self) -> bool {
        if self.closed.swap(true, Ordering::AcqRel) {
            return false;
        }
        // A child's registry is not the one that gave the leases.
        if self.forks == forks() {
            self.release_leases();
            scopes().with(|ledger| ledger.unbind_runner(self.scope_id));
        }
        true
    }
}

/// Leases `keys`, all or none: what the scope has joined at the generation that it joined, so that
/// what was torn down since, or made anew for others, is refused.
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
    #[pyo3(signature = (name, scope, keys, *, ordered=false))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(
        py: Python<'_>,
        name: String,
        scope: Option<Bound<'_, Scope>>,
        keys: Vec<String>,
        ordered: bool,
    ) -> PyResult<Self> {
        let keys: Vec<_> = keys
            .iter()
            .map(|key| convert::key(key))
            .collect::<PyResult<_>>()?;
        let scope_id = scope
            .as_ref()
            .map_or(DEFAULT, |scope| scope.get().scope_id());
        let leases = lease(py, scope_id, keys, &name)?;
        scopes().with(|ledger| ledger.bind_runner(scope_id));
        Ok(Self {
            name,
            scope: scope.map(Bound::unbind),
            scope_id,
            leases: Mutex::new(leases),
            ordered,
            forwarding: Mutex::new(None),
            closed: AtomicBool::new(false),
            pid: std::process::id(),
            forks: forks(),
        })
    }

    #[getter]
    fn name(&self) -> &str {
        &self.name
    }

    #[getter]
    fn ordered(&self) -> bool {
        self.ordered
    }

    #[getter]
    fn scope(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|scope| scope.clone_ref(py))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Takes one more lease.
    fn hold(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        let key = convert::key(key)?;
        self.check(py)?;
        let taken = lease(py, self.scope_id, vec![key], &self.name)?;
        self.leases().extend(taken);
        if self.closed() {
            // By another thread, which may have released the leases before these were among them.
            self.release_leases();
        }
        Ok(())
    }

    /// Raises when the runner was closed, belongs to another process or lost what it held.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
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
            return good.map_err(|error| to_python(py, &error));
        };
        let details = PyDict::new(py);
        details.set_item("runner", &self.name)?;
        Err(make(py, class, &message, &details)?)
    }

    /// Makes the runner's scope current for one of its methods; give the result to `leave`.
    fn enter(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        self.check(py)?;
        scope::enter(py, self.scope.as_ref().map(|scope| scope.bind(py).clone()))
    }

    /// Claims the runner for a forward of the calling thread; end it with `end_forward`.
    fn begin_forward(&self, py: Python<'_>) -> PyResult<()> {
        let me = convert::actor(py, None)?;
        let other = {
            let mut forwarding = self.forwarding();
            match &mut *forwarding {
                Some((actor, depth)) if actor.thread == me.thread => {
                    *depth += 1;
                    return Ok(());
                }
                Some((actor, _)) => actor.to_string(),
                empty @ None => {
                    *empty = Some((me, 1));
                    return Ok(());
                }
            }
        };
        let details = PyDict::new(py);
        details.set_item("runner", &self.name)?;
        details.set_item("holders", [&other])?;
        let message = format!(
            "runner '{}' is in a forward of {other}: its attention metadata and static buffers \
             hold one batch at a time. Let one thread forward it at a time, or build one runner \
             per thread",
            self.name
        );
        Err(make(py, "StateInUse", &message, &details)?)
    }

    fn end_forward(&self) {
        let mut forwarding = self.forwarding();
        if let Some((_, depth)) = &mut *forwarding {
            *depth -= 1;
            if *depth == 0 {
                *forwarding = None;
            }
        }
    }

    /// Releases the leases and, when it was the scope's last runner, the scope's values.
    fn close(&self, py: Python<'_>) -> bool {
        let first = self.release();
        if let Some(scope) = self.scope.as_ref().filter(|_| first) {
            if scopes().with(|ledger| ledger.live(self.scope_id)) == 0 {
                scope.bind(py).get().clear();
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
