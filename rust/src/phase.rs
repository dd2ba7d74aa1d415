//! The phase lock as a Python object: lines up, enters, waits detached, leaves.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use distguard_core::enter::Entry;
use distguard_core::phases::{Access, Phase, VisitId};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert;
use crate::errors::to_python;
use crate::exit::wait_detached;
use crate::process::registry;
use crate::runner::RunnerHandle;

/// One visit to a phase; it ends with `leave` or when it is dropped.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Visit {
    id: VisitId,
    since: Duration,
    /// The epoch that the next wait compares with; `INSIDE` if there is nothing to wait for.
    epoch: AtomicU64,
    /// Whether the visit was handed over: then the new owner ends it.
    kept: AtomicBool,
}

const INSIDE: u64 = u64::MAX;

impl Visit {
    /// A visit that has arrived and must wait.
    pub fn waiting(id: VisitId, entry: &Entry) -> Self {
        let visit = Self {
            id,
            since: registry().now(),
            epoch: AtomicU64::new(INSIDE),
            kept: AtomicBool::new(false),
        };
        visit.note(entry);
        visit
    }

    /// Hands the visit over: the caller must end it.
    pub fn keep(&self) -> VisitId {
        self.kept.store(true, Ordering::Relaxed);
        self.id
    }

    /// Ends the visit, unless it was handed over.
    pub fn end(&self) -> bool {
        !self.kept.load(Ordering::Relaxed) && registry().leave(self.id)
    }

    fn note(&self, entry: &Entry) -> bool {
        let epoch = match entry {
            Entry::Inside => INSIDE,
            Entry::Wait { epoch, .. } => *epoch,
        };
        self.epoch.store(epoch, Ordering::Relaxed);
        epoch == INSIDE
    }
}

#[pymethods]
impl Visit {
    /// Lines up for `phase`, and enters if nothing is in the way.
    #[new]
    #[pyo3(signature = (phase, *, runner, handle=None))]
    fn new(
        py: Python<'_>,
        phase: &str,
        runner: Option<String>,
        handle: Option<&Bound<'_, RunnerHandle>>,
    ) -> PyResult<Self> {
        let phase: Phase = phase.parse().map_err(PyValueError::new_err)?;
        let access = handle.map_or_else(|| Access::from(phase), |it| it.get().access(phase));
        let actor = convert::actor(py, runner)?;
        let arrived = registry().arrive(access, &actor);
        let (id, entry) = arrived.map_err(|error| to_python(py, &error))?;
        Ok(Self::waiting(id, &entry))
    }

    fn try_enter(&self, py: Python<'_>) -> PyResult<bool> {
        if self.epoch.load(Ordering::Relaxed) == INSIDE {
            return Ok(true);
        }
        let entry = registry().try_enter(self.id);
        Ok(self.note(&entry.map_err(|error| to_python(py, &error))?))
    }

    /// Seconds after which the caller must retry: infinite, because every change wakes the waiter.
    #[getter]
    #[allow(clippy::unused_self)]
    fn patience(&self) -> f64 {
        f64::INFINITY
    }

    fn wait(&self, py: Python<'_>, seconds: f64) {
        let slice = convert::seconds(seconds);
        let epoch = self.epoch.load(Ordering::Relaxed);
        wait_detached(py, || registry().wait_to_enter(self.id, epoch, slice));
    }

    /// The error for a caller that stops waiting; the visit has ended.
    fn timed_out(&self, py: Python<'_>) -> PyErr {
        let waited = registry().now().saturating_sub(self.since);
        to_python(py, &registry().phase_timed_out(self.id, waited))
    }

    fn leave(&self) -> bool {
        self.end()
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.end();
    }
}
