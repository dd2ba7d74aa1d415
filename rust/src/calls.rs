//! The calls inside managers as Python objects: which there are, and one that no method makes.

use std::sync::{Arc, Mutex};

use distguard_core::actor::Actor;
use distguard_core::calls::{Call, CallId};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{PyTraverseError, PyVisit};

use crate::convert;
use crate::process::{calls, forks};
use crate::runner::RunnerHandle;
use crate::sync::lock;

/// (thread, manager, method) of every call that is inside a manager's method.
#[pyfunction]
pub fn calls_inside() -> Vec<(String, String, String)> {
    let all = calls().all().into_iter();
    all.map(|it| {
        let manager = it.actor.runner.as_deref().unwrap_or_default().to_owned();
        (
            it.actor.thread_name.to_string(),
            manager,
            it.step.to_string(),
        )
    })
    .collect()
}

/// Notes a call in the method `step` of a manager; the caller ends it.
pub fn enter(
    py: Python<'_>,
    handle: &RunnerHandle,
    step: Arc<str>,
    counts: bool,
    actor: &Actor,
) -> PyResult<CallId> {
    let entered = calls().enter(Call {
        manager: handle.id(),
        step,
        actor: actor.clone(),
        counts,
    });
    entered.ok_or_else(|| handle.closed_error(py))
}

/// A context manager: a call is inside a manager's method, whatever code runs in the block.
///
/// For a generator, which is under way also between two items.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Holding {
    handle: Py<RunnerHandle>,
    step: Arc<str>,
    counts: bool,
    held: Mutex<Option<(CallId, u32)>>,
}

#[pymethods]
impl Holding {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        let handle = self.handle.bind(py).get();
        handle.check(py)?;
        let actor = convert::this_actor(py, Some(handle.name_ref()))?;
        let call = enter(py, handle, self.step.clone(), self.counts, &actor)?;
        *lock(&self.held) = Some((call, forks()));
        Ok(())
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, PyTuple>) {
        self.end();
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.handle)
    }
}

impl Holding {
    pub fn new(handle: Py<RunnerHandle>, step: Arc<str>, counts: bool) -> Self {
        Self {
            handle,
            step,
            counts,
            held: Mutex::default(),
        }
    }

    fn end(&self) {
        if let Some((call, made_in)) = lock(&self.held).take() {
            // A forked child has not inherited the call.
            if made_in == forks() {
                calls().leave(call);
            }
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.end();
    }
}
