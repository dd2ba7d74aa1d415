//! The room lock as a Python object: lines up, enters, waits detached, leaves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use distguard_core::enter::Entry;
use distguard_core::rooms::{Room, VisitId};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::convert;
use crate::errors::to_python;
use crate::exit::wait_detached;
use crate::process::registry;

/// One visit to a room; it ends with `leave` or when it is dropped.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Visit {
    id: VisitId,
    since: Duration,
    /// What the next wait compares with; `INSIDE` when there is nothing to wait for.
    epoch: AtomicU64,
}

const INSIDE: u64 = u64::MAX;

impl Visit {
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
    /// Lines up for `room`, and enters if nothing is in the way.
    #[new]
    #[pyo3(signature = (room, *, runner))]
    fn new(py: Python<'_>, room: &str, runner: Option<String>) -> PyResult<Self> {
        let room: Room = room.parse().map_err(PyValueError::new_err)?;
        let actor = convert::actor(py, runner)?;
        let since = registry().now();
        let arrived = registry().arrive(room, &actor);
        let (id, entry) = arrived.map_err(|error| to_python(py, &error))?;
        let visit = Self {
            id,
            since,
            epoch: AtomicU64::new(INSIDE),
        };
        visit.note(&entry);
        Ok(visit)
    }

    fn try_enter(&self, py: Python<'_>) -> PyResult<bool> {
        if self.epoch.load(Ordering::Relaxed) == INSIDE {
            return Ok(true);
        }
        let entry = registry().try_enter(self.id);
        Ok(self.note(&entry.map_err(|error| to_python(py, &error))?))
    }

    fn wait(&self, py: Python<'_>, seconds: f64) {
        let slice = convert::seconds(seconds);
        let epoch = self.epoch.load(Ordering::Relaxed);
        wait_detached(py, || registry().wait_to_enter(self.id, epoch, slice));
    }

    /// The error of a caller that gives up; the visit is over.
    fn timed_out(&self, py: Python<'_>) -> PyErr {
        let waited = registry().now().saturating_sub(self.since);
        to_python(py, &registry().room_timed_out(self.id, waited))
    }

    fn leave(&self) -> bool {
        registry().leave(self.id)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.leave();
    }
}
