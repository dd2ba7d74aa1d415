//! `activate`: the running code belongs to a runner, outside of its steps.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;

use distguard_core::actor::Actor;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{PyTraverseError, PyVisit};

use crate::convert;
use crate::device::{self, OnDevice};
use crate::execution::{self, Entry};
use crate::exit;
use crate::runner::RunnerHandle;
use crate::step::{is_inside, of_runner};
use crate::sync::lock;

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// The actors that have entered an `Activation` and not left it.
static ACTIVATIONS: Mutex<BTreeMap<u64, Actor>> = Mutex::new(BTreeMap::new());

/// (thread, runner) of every `Activation` that is entered now.
#[pyfunction]
pub fn activations() -> Vec<(String, String)> {
    let named = |actor: &Actor| {
        let runner = actor.runner.as_deref().unwrap_or_default();
        (actor.thread_name.to_string(), runner.to_owned())
    };
    lock(&ACTIVATIONS).values().map(named).collect()
}

/// For a forked child, which has only the forking thread.
pub fn start_afresh() {
    let me = convert::this_thread();
    lock(&ACTIVATIONS).retain(|_, actor| actor.thread == me);
}

/// A context manager: the running code belongs to the runner, outside of its steps.
///
/// It may idle, and be left during another thread's step: it holds nothing and delays no exit.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Activation {
    handle: Py<RunnerHandle>,
    /// What `with … as` gives.
    runner: Py<PyAny>,
    entries: Mutex<Vec<(Entry, Option<OnDevice>, u64)>>,
}

#[pymethods]
impl Activation {
    #[new]
    fn new(handle: Py<RunnerHandle>, runner: Py<PyAny>) -> Self {
        Self {
            handle,
            runner,
            entries: Mutex::default(),
        }
    }

    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let handle = self.handle.bind(py).get();
        exit::stop_if_exiting(py, is_inside());
        handle.check(py)?;
        let now = execution::current(py)?;
        let wanted = of_runner(py, &self.handle, now.as_ref().map(Bound::get));
        let wanted = Bound::new(py, wanted)?;
        let actor = convert::this_actor(py, Some(handle.name_ref()))?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let entry = Entry::new(py, Some(&wanted))?;
        // Blocks of several tasks of a loop do not end in the opposite order.
        let kept = handle.has_device() && device::is_shared(py).unwrap_or(false);
        let device = if kept { Ok(None) } else { handle.on_device(py) };
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                entry.leave(py)?;
                return Err(error);
            }
        };
        lock(&ACTIVATIONS).insert(number, actor);
        lock(&self.entries).push((entry, device, number));
        Ok(self.runner.clone_ref(py))
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> PyResult<()> {
        let entry = lock(&self.entries).pop();
        let Some((entry, device, number)) = entry else {
            return Err(PyRuntimeError::new_err(
                "this with block was left more often than it was entered",
            ));
        };
        lock(&ACTIVATIONS).remove(&number);
        let restored = device.map_or(Ok(()), |it| it.restore(py));
        entry.leave(py).and(restored)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.handle)?;
        visit.call(&self.runner)
    }
}

impl Drop for Activation {
    fn drop(&mut self) {
        let entries = std::mem::take(&mut *lock(&self.entries));
        if entries.is_empty() {
            return;
        }
        Python::attach(|py| {
            for (entry, device, number) in entries.into_iter().rev() {
                lock(&ACTIVATIONS).remove(&number);
                let _ = device.map_or(Ok(()), |it| it.restore(py));
                let _ = entry.leave(py); // fails in another context, or too late
            }
        });
    }
}
