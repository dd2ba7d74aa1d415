//! The default dtype that executions carry, and whether a thread must intercept torch's for them.
//!
//! torch keeps what intercepts (a function mode) per thread, executions travel with contexts: of two
//! asyncio tasks on one thread one may carry a dtype while the other ends a step. So the thread
//! intercepts until no execution lives that got its dtype there.

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
}

impl HeldDtype {
    /// For an execution that is carried to another thread, which holds it anew: this one need not
    /// intercept for what lives on there.
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

/// An execution was left: stop intercepting when nothing on this thread needs it any more.
pub fn settle(py: Python<'_>) -> PyResult<()> {
    let needed = HELD.with(|held| held.borrow().load(Ordering::Acquire)) > 0;
    if needed || !INTERCEPTS.with(Cell::get) {
        return Ok(());
    }
    let module = py.import(intern!(py, "sglang_distguard.context.default_dtype"))?;
    module.call_method0(intern!(py, "stop_intercepting"))?;
    Ok(())
}

/// Notes whether this thread intercepts; returns what it did before.
#[pyfunction]
pub fn note_intercepting(intercepts: bool) -> bool {
    INTERCEPTS.with(|it| it.replace(intercepts))
}
