//! The registry as Python functions: converts, waits detached from the interpreter, raises.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use distguard_core::key::Key;
use distguard_core::policy::Policy;
use distguard_core::registry::{Observed, Request, Step};
use distguard_core::slot::{Origin, Ticket};
use distguard_core::spec::Spec;
use distguard_core::teardown::Teardown as Begun;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert;
use crate::errors::to_python;
use crate::process::{self, registry};

/// How long a wait goes without looking for signals: what Ctrl-C may take at worst.
const SLICE: Duration = Duration::from_millis(50);

/// What `acquire` decided, and for a leader the duty to publish, fail or poison.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Claim {
    key: Key,
    spec: Spec,
    decision: &'static str,
    waited: Duration,
    /// Taken by whichever of publish, fail, poison and drop comes first.
    ticket: Mutex<Option<Ticket>>,
}

impl Claim {
    fn take(&self) -> Option<Ticket> {
        let mut ticket = self.ticket.lock().unwrap_or_else(PoisonError::into_inner);
        ticket.take()
    }
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
    fn resource(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        process::resource(py, &self.key)
    }

    #[pyo3(signature = (*, identity, resource, spec=None))]
    fn publish(
        &self,
        py: Python<'_>,
        identity: u64,
        resource: Py<PyAny>,
        spec: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let spec = match spec {
            Some(fields) => convert::spec(fields)?,
            None => self.spec.clone(),
        };
        let Some(ticket) = self.take() else {
            return Ok(());
        };
        let origin = if self.decision == "adopt" {
            Origin::Adopted
        } else {
            Origin::Created
        };
        // Before the state can be joined: a joiner reads it at once.
        process::set_resource(&self.key, Some(resource));
        match registry().publish(ticket, spec, origin, identity) {
            Ok(_) => Ok(()),
            Err(error) => Err(to_python(py, &error)),
        }
    }

    fn fail(&self, reason: &str) {
        if let Some(ticket) = self.take() {
            registry().fail(ticket, reason);
        }
    }

    fn poison(&self, reason: &str) {
        if let Some(ticket) = self.take() {
            registry().poison(ticket, reason);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(ticket) = self.take() {
            registry().fail(ticket, "the leader ended without a result");
        }
    }
}

fn observed(py: Python<'_>, observe: &Py<PyAny>) -> PyResult<Observed> {
    let identity: Option<u64> = observe.call0(py)?.extract(py)?;
    Ok(identity.map_or(Observed::Absent, Observed::Present))
}

/// Leads, adopts, joins or goes on nested; waits for another leader; raises when refused.
#[pyfunction]
#[pyo3(signature = (key, spec, *, runner, reuse, reentrant, timeout, observe))]
#[allow(clippy::too_many_arguments)]
pub fn acquire(
    py: Python<'_>,
    key: &str,
    spec: &Bound<'_, PyDict>,
    runner: Option<String>,
    reuse: bool,
    reentrant: bool,
    timeout: f64,
    observe: Py<PyAny>,
) -> PyResult<Claim> {
    let start = registry().now();
    // An endless or absurd timeout is one that never passes.
    let deadline = Duration::try_from_secs_f64(timeout).unwrap_or(Duration::MAX);
    let mut request = Request {
        key: convert::key(key)?,
        spec: convert::spec(spec)?,
        policy: Policy { reuse, reentrant },
        actor: convert::actor(py, runner)?,
        observed: Observed::Unknown,
        waited: Duration::ZERO,
    };
    loop {
        request.observed = observed(py, &observe)?;
        let step = registry().try_acquire(&request);
        let (decision, ticket) = match step.map_err(|error| to_python(py, &error))? {
            Step::Lead(ticket) => ("lead", Some(ticket)),
            Step::Adopt(ticket) => ("adopt", Some(ticket)),
            Step::Join { .. } => ("join", None),
            Step::Nested => ("nested", None),
            Step::Wait { epoch, .. } => {
                request.waited = registry().now().saturating_sub(start);
                let Some(left) = deadline
                    .checked_sub(request.waited)
                    .filter(|d| !d.is_zero())
                else {
                    return Err(to_python(py, &registry().timed_out(&request)));
                };
                py.detach(|| registry().wait(&request, epoch, SLICE.min(left)));
                py.check_signals()?;
                request.waited = registry().now().saturating_sub(start);
                continue;
            }
        };
        return Ok(Claim {
            key: request.key,
            spec: request.spec,
            decision,
            waited: request.waited,
            ticket: Mutex::new(ticket),
        });
    }
}

/// Whether `key` can be joined.
#[pyfunction]
pub fn is_ready(key: &str) -> PyResult<bool> {
    Ok(registry().is_ready(&convert::key(key)?))
}

/// What the leader of `key` published for joiners; None while it cannot be joined.
#[pyfunction]
pub fn resource(py: Python<'_>, key: &str) -> PyResult<Option<Py<PyAny>>> {
    Ok(process::resource(py, &convert::key(key)?))
}

/// Makes state that nobody holds available to be made anew.
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
    ticket: Mutex<Option<Ticket>>,
}

impl Teardown {
    fn take(&self) -> Option<Ticket> {
        let mut ticket = self.ticket.lock().unwrap_or_else(PoisonError::into_inner);
        ticket.take()
    }
}

#[pymethods]
impl Teardown {
    /// "created", "adopted", or None when the registry knows of nothing.
    #[getter]
    fn origin(&self) -> Option<&'static str> {
        self.origin.map(convert::origin)
    }

    #[getter]
    fn resource(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.resource.as_ref().map(|value| value.clone_ref(py))
    }

    fn end(&self) {
        if let Some(ticket) = self.take() {
            process::set_resource(&self.key, None);
            registry().end_teardown(ticket);
        }
    }

    fn poison(&self, reason: &str) {
        if let Some(ticket) = self.take() {
            process::set_resource(&self.key, None);
            registry().poison(ticket, reason);
        }
    }
}

impl Drop for Teardown {
    fn drop(&mut self) {
        if let Some(ticket) = self.take() {
            registry().poison(ticket, "the teardown ended without a result");
        }
    }
}

/// Closes `key` for teardown; raises `StateInUse` while it is leased or changing.
#[pyfunction]
#[pyo3(signature = (key, *, runner, force))]
pub fn begin_teardown(
    py: Python<'_>,
    key: &str,
    runner: Option<String>,
    force: bool,
) -> PyResult<Teardown> {
    let key = convert::key(key)?;
    let resource = process::resource(py, &key);
    let actor = convert::actor(py, runner)?;
    let begun = registry().begin_teardown(&key, &actor, force);
    let (origin, ticket) = match begun.map_err(|error| to_python(py, &error))? {
        Begun::Nothing => (None, None),
        Begun::Begun { ticket, origin, .. } => (Some(origin), Some(ticket)),
    };
    Ok(Teardown {
        key,
        origin,
        resource: resource.filter(|_| ticket.is_some()),
        ticket: Mutex::new(ticket),
    })
}

/// Forgets all state, also poisoned; raises `StateInUse` while any is leased or changing.
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

/// The registry as plain data.
#[pyfunction]
pub fn snapshot(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    convert::snapshot(py, &registry().snapshot())
}
