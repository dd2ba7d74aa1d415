//! The default dtype that executions carry, and whether a thread must intercept torch's for them.
//!
//! torch keeps the interceptor (a function mode) per thread, but executions travel with contexts.
//! Of two asyncio tasks on one thread, one may carry a dtype while the other ends a step. So a
//! thread intercepts until no execution is left that got its dtype on that thread.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use pyo3::intern;
use pyo3::prelude::*;

thread_local! {
    /// How many dtypes are held by executions that got them on this thread.
    static HELD: RefCell<Arc<AtomicUsize>> = RefCell::default();
    static INTERCEPTS: Cell<bool> = const { Cell::new(false) };
}

/// One dtype, for as long as any execution carries it.
pub struct HeldDtype {
    pub dtype: Py<PyAny>,
    held: Arc<AtomicUsize>,
}

impl HeldDtype {
    pub fn new(dtype: Py<PyAny>) -> Arc<Self> {
        let held = HELD.with(|held| held.borrow().clone());
        held.fetch_add(1, Ordering::AcqRel);
        Arc::new(Self { dtype, held })
    }

    /// The dtype for an execution that is carried to another thread, counted separately: this
    /// thread need not intercept for executions that live on there.
    pub fn carried(&self, py: Python<'_>) -> Arc<Self> {
        let held = Arc::new(AtomicUsize::new(1));
        Arc::new(Self {
            dtype: self.dtype.clone_ref(py),
            held,
        })
    }
}

impl Drop for HeldDtype {
    fn drop(&mut self) {
        self.held.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Stops intercepting, after an execution was left, if no execution of this thread needs it.
pub fn settle(py: Python<'_>) -> PyResult<()> {
    let needed = HELD.with(|held| held.borrow().load(Ordering::Acquire)) > 0;
    if needed || !INTERCEPTS.with(Cell::get) {
        return Ok(());
    }
    let module = py.import(intern!(py, "sglang_distguard.context.default_dtype"))?;
    module.call_method0(intern!(py, "stop_intercepting"))?;
    Ok(())
}

/// Notes whether this thread intercepts; returns whether it did before.
#[pyfunction]
pub fn note_intercepting(intercepts: bool) -> bool {
    INTERCEPTS.with(|it| it.replace(intercepts))
}
