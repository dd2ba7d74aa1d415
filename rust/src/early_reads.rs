//! When functions that make all their reads of scoped globals at once may read them directly:
//! what changes their code is Python's (`process.installation`), and called from here.

use std::sync::Mutex;

use pyo3::prelude::*;

use crate::scope::no_scope_exists;
use crate::sync::lock;

type Call = Mutex<Option<Py<PyAny>>>;

static BEFORE_SCOPES: Call = Mutex::new(None);
static AFTER_BUILDS: Call = Mutex::new(None);

fn replace(named: &Call, call: Option<Py<PyAny>>) {
    let before = std::mem::replace(&mut *lock(named), call);
    drop(before); // without the lock: that may run Python
}

fn run(py: Python<'_>, named: &Call) -> PyResult<()> {
    let call = lock(named).as_ref().map(|it| it.clone_ref(py));
    call.map_or(Ok(()), |call| call.call0(py).map(drop))
}

/// To be called when a scope is counted, before code enters it.
pub fn scope_begins(py: Python<'_>) -> PyResult<()> {
    run(py, &BEFORE_SCOPES)
}

/// Every scope calls `call` before code enters it, until another one or None is named here.
///
/// Several threads may call it at once. When it raises, no scope begins.
#[pyfunction]
#[pyo3(signature = (call, /))]
pub fn call_before_scopes(call: Option<Py<PyAny>>) {
    replace(&BEFORE_SCOPES, call);
}

/// Every build that ends while no scope exists calls `call`, until another one or None is named.
#[pyfunction]
#[pyo3(signature = (call, /))]
pub fn call_after_builds(call: Option<Py<PyAny>>) {
    replace(&AFTER_BUILDS, call);
}

/// Notes that a runner was built.
#[pyfunction]
pub fn note_build(py: Python<'_>) -> PyResult<()> {
    if no_scope_exists() {
        run(py, &AFTER_BUILDS)?;
    }
    Ok(())
}
