//! The registry as Python objects and functions: converts, waits detached, raises.
//! The loop around `try_acquire` and `wait` is Python code: a thread that CPython ends at exit
//! while it runs Python must have no frame of this module below it (see `exit`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use distguard_core::key::Key;
use distguard_core::policy::Policy;
use distguard_core::registry::{Observed, Request as Wish, Step};
use distguard_core::slot::{Origin, Ticket};
use distguard_core::spec::Spec;
use distguard_core::teardown::Teardown as Begun;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyInt, PyList};

use crate::activation;
use crate::convert;
use crate::errors::to_python;
use crate::exit::{self, wait_detached};
use crate::process::{self, registry};
use crate::step;
use crate::sync::lock;

/// The decision on a request. A leader must publish, fail or poison.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Claim {
    key: Key,
    spec: Spec,
    decision: &'static str,
    waited: Duration,
    /// The generation that was joined or published; 0 before that.
    generation: AtomicU64,
    /// Taken by the first of publish, fail, poison and drop.
    ticket: Mutex<Option<Ticket>>,
}

#[pymethods]
impl Claim {
    #[getter]
    fn decision(&self) -> &'static str {
        self.decision
    }

    #[getter]
    fn waited(&self) -> f64 {
        self.waited.as_secs_f64()
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Whether the caller leads and has not given a result yet.
    #[getter]
    fn pending(&self) -> bool {
        lock(&self.ticket).is_some()
    }

    #[getter]
    fn resource(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        process::resource(py, &self.key)
    }

    #[pyo3(signature = (*, identity, resource, spec=None))]
    fn publish(
        &self,
        py: Python<'_>,
        identity: &Bound<'_, PyInt>,
        resource: Py<PyAny>,
        spec: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let identity = convert::whole("identity", identity)?;
        let spec = match spec {
            Some(fields) => convert::spec(fields)?,
            None => self.spec.clone(),
        };
        let Some(ticket) = lock(&self.ticket).take() else {
            return Ok(());
        };
        let origin = if self.decision == "adopt" {
            Origin::Adopted
        } else {
            Origin::Created
        };
        // Set before the state can be joined: a joiner reads it at once.
        process::set_resource(&self.key, Some(resource));
        let published = registry().publish(ticket, spec, origin, identity);
        let generation = published.map_err(|error| to_python(py, &error))?;
        self.generation.store(generation, Ordering::Relaxed);
        Ok(())
    }

    fn fail(&self, reason: &str) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            registry().fail(ticket, reason);
        }
    }

    fn poison(&self, reason: &str) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            registry().poison(ticket, reason);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            registry().fail(ticket, "the leader ended without a result");
        }
    }
}

/// One caller's request to have a key initialised, from the first try to the decision.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Request {
    /// Locked only for the time that a copy takes.
    wish: Mutex<Wish>,
    /// The epoch that the next wait compares with.
    epoch: AtomicU64,
    start: Duration,
}

impl Request {
    fn wish(&self) -> MutexGuard<'_, Wish> {
        lock(&self.wish)
    }

    /// A copy of the request, with the time that it has waited until now.
    fn now(&self) -> Wish {
        let mut wish = self.wish();
        if !wish.waited.is_zero() {
            wish.waited = registry().now().saturating_sub(self.start);
        }
        wish.clone()
    }
}

#[pymethods]
impl Request {
    #[new]
    #[pyo3(signature = (key, spec, *, runner, reuse, reentrant, slow_after))]
    fn new(
        py: Python<'_>,
        key: &str,
        spec: &Bound<'_, PyDict>,
        runner: Option<String>,
        reuse: bool,
        reentrant: bool,
        slow_after: f64,
    ) -> PyResult<Self> {
        let wish = Wish {
            key: convert::key(key)?,
            spec: convert::spec(spec)?,
            policy: Policy { reuse, reentrant },
            actor: convert::actor(py, runner)?,
            observed: Observed::Unknown,
            waited: Duration::ZERO,
            slow_after: convert::seconds(slow_after),
        };
        Ok(Self {
            wish: Mutex::new(wish),
            epoch: AtomicU64::new(0),
            start: registry().now(),
        })
    }

    /// Decides; on None the caller must `wait`, look at the process again, and retry.
    #[pyo3(signature = (identity, /))]
    fn try_acquire(
        &self,
        py: Python<'_>,
        identity: Option<&Bound<'_, PyInt>>,
    ) -> PyResult<Option<Claim>> {
        let identity = identity
            .map(|it| convert::whole("identity", it))
            .transpose()?;
        self.wish().observed = identity.map_or(Observed::Absent, Observed::Present);
        let wish = self.now();
        let step = registry().try_acquire(&wish);
        let (decision, ticket, generation) = match step.map_err(|error| to_python(py, &error))? {
            Step::Lead(ticket) => ("lead", Some(ticket), 0),
            Step::Adopt(ticket) => ("adopt", Some(ticket), 0),
            Step::Join { generation } => ("join", None, generation),
            Step::Nested => ("nested", None, 0),
            Step::Wait { epoch, .. } => {
                self.epoch.store(epoch, Ordering::Relaxed);
                return Ok(None);
            }
        };
        Ok(Some(Claim {
            key: wish.key,
            spec: wish.spec,
            decision,
            waited: wish.waited,
            generation: AtomicU64::new(generation),
            ticket: Mutex::new(ticket),
        }))
    }

    /// Seconds after which the leader counts as slow; only a retry notices that.
    #[getter]
    fn patience(&self) -> f64 {
        self.wish().slow_after.as_secs_f64()
    }

    /// Sleeps, detached from the interpreter, until the key changes, at most `seconds`.
    fn wait(&self, py: Python<'_>, seconds: f64) {
        let slice = convert::seconds(seconds);
        let wish = self.now();
        let epoch = self.epoch.load(Ordering::Relaxed);
        wait_detached(py, || registry().wait(&wish, epoch, slice));
        // From here on the request counts as one that has waited, even if for no time at all.
        let waited = registry().now().saturating_sub(self.start);
        self.wish().waited = waited.max(Duration::from_nanos(1));
    }

    /// The error for a caller that stops waiting.
    fn timed_out(&self, py: Python<'_>) -> PyErr {
        let mut wish = self.now();
        wish.waited = registry().now().saturating_sub(self.start);
        to_python(py, &registry().timed_out(&wish))
    }
}

/// Whether `key` can be joined.
#[pyfunction]
pub fn is_ready(key: &str) -> PyResult<bool> {
    Ok(registry().is_ready(&convert::key(key)?))
}

/// The resource that the leader of `key` published for joiners; None while it cannot be joined.
#[pyfunction]
pub fn resource(py: Python<'_>, key: &str) -> PyResult<Option<Py<PyAny>>> {
    Ok(process::resource(py, &convert::key(key)?))
}

/// The names of the holders of `key`, oldest first.
#[pyfunction]
pub fn holders(key: &str) -> PyResult<Vec<String>> {
    Ok(registry().holders(&convert::key(key)?))
}

/// Every key whose state can be joined now.
#[pyfunction]
pub fn ready_keys() -> Vec<String> {
    registry().ready_keys().iter().map(Key::to_string).collect()
}

/// Forgets state on which no lease is held, so that it can be made anew.
#[pyfunction]
pub fn forget(key: &str) -> PyResult<bool> {
    Ok(registry().forget(&convert::key(key)?))
}

/// State that is being torn down.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Teardown {
    key: Key,
    origin: Option<Origin>,
    resource: Option<Py<PyAny>>,
    started: AtomicBool,
    ticket: Mutex<Option<Ticket>>,
}

#[pymethods]
impl Teardown {
    /// "created", "adopted", or None if the registry has no such state.
    #[getter]
    fn origin(&self) -> Option<&'static str> {
        self.origin.map(convert::origin)
    }

    #[getter]
    fn resource(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.resource.as_ref().map(|value| value.clone_ref(py))
    }

    /// From here until `end` the state is incomplete.
    fn start(&self) {
        self.started.store(true, Ordering::Relaxed);
    }

    fn end(&self) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            process::set_resource(&self.key, None);
            registry().end_teardown(ticket);
        }
    }

    /// Restores the state with its leases, because nothing was destroyed.
    fn cancel(&self, reason: &str) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            registry().fail(ticket, reason);
        }
    }

    fn poison(&self, reason: &str) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            process::set_resource(&self.key, None);
            registry().poison(ticket, reason);
        }
    }
}

impl Drop for Teardown {
    fn drop(&mut self) {
        let ticket = lock(&self.ticket).take();
        if let Some(ticket) = ticket {
            let reason = "the teardown ended without a result";
            if self.started.load(Ordering::Relaxed) {
                registry().poison(ticket, reason);
            } else {
                registry().fail(ticket, reason);
            }
        }
    }
}

/// Closes `key` for teardown; raises `StateInUse` while it is leased or changing. With force, those
/// who lease it are told `why`.
#[pyfunction]
#[pyo3(signature = (key, *, runner, force, why=""))]
pub fn begin_teardown(
    py: Python<'_>,
    key: &str,
    runner: Option<String>,
    force: bool,
    why: &str,
) -> PyResult<Teardown> {
    let key = convert::key(key)?;
    let resource = process::resource(py, &key);
    let actor = convert::actor(py, runner)?;
    let begun = registry().begin_teardown_because(&key, &actor, force, why);
    let (origin, ticket) = match begun.map_err(|error| to_python(py, &error))? {
        Begun::Nothing => (None, None),
        Begun::Begun { ticket, origin, .. } => (Some(origin), Some(ticket)),
    };
    Ok(Teardown {
        key,
        origin,
        resource: resource.filter(|_| ticket.is_some()),
        started: AtomicBool::new(false),
        ticket: Mutex::new(ticket),
    })
}

/// Forgets all state, poisoned state too; raises `StateInUse` while any is leased or changing.
#[pyfunction]
#[pyo3(signature = (*, force))]
pub fn reset(py: Python<'_>, force: bool) -> PyResult<()> {
    let actor = convert::actor(py, None)?;
    registry()
        .reset(&actor, force)
        .map_err(|error| to_python(py, &error))?;
    process::clear_resources();
    Ok(())
}

/// Begins with an empty registry; a forked child calls this before anything else.
#[pyfunction]
pub fn start_afresh() {
    process::start_afresh();
    exit::start_afresh(step::is_inside());
    activation::start_afresh();
}

/// Refuses requests for `key` that find the object `identity`, which was inherited over a fork.
#[pyfunction]
pub fn inherit(key: &str, identity: &Bound<'_, PyInt>) -> PyResult<()> {
    registry().inherit(&convert::key(key)?, convert::whole("identity", identity)?);
    Ok(())
}

/// The events that no earlier call returned, oldest first; events that the ring dropped are lost.
#[pyfunction]
pub fn take_events(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    convert::events(py, &process::take_events())
}

/// The registry as plain data.
#[pyfunction]
pub fn snapshot(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    convert::snapshot(py, &registry().snapshot())
}
