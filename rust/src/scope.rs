//! Scopes: whose view of SGLang's process-globals the running code has.
//! The active one lives in a `ContextVar`, so threads and asyncio tasks each have their own.
//! Holds values, never decides: who gets a new scope is `distguard_core::scopes`.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use distguard_core::key::Key;
use distguard_core::scopes::{Publish, ScopeId, ScopeLedger, DEFAULT};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyInt, PyString, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{intern, PyTraverseError, PyVisit};

use crate::convert;
use crate::exit;
use crate::process;
use crate::sync::lock;

/// One runner's own values of SGLang's module globals.
///
/// SGLang's default scope, the module globals themselves, has no `Scope`: it is `None`.
#[pyclass(frozen, weakref, module = "sglang_distguard._core")]
pub struct Scope {
    id: ScopeId,
    label: Mutex<String>,
    /// Indexed by `ScopedGlobal` slot; `None` means not yet read or written in this scope.
    /// Never locked while Python runs: a value that is replaced is dropped after unlocking.
    values: Mutex<Vec<Option<Py<PyAny>>>>,
}

/// How many scopes exist. None: the running code's cannot be one, and nothing need be looked up.
static ALIVE: AtomicUsize = AtomicUsize::new(0);

impl Scope {
    pub fn new(id: ScopeId, label: String) -> Self {
        ALIVE.fetch_add(1, Ordering::Relaxed);
        Self {
            id,
            label: Mutex::new(label),
            values: Mutex::new(Vec::new()),
        }
    }

    pub fn scope_id(&self) -> ScopeId {
        self.id
    }

    pub fn read(&self, py: Python<'_>, slot: usize) -> Option<Py<PyAny>> {
        let values = lock(&self.values);
        values.get(slot)?.as_ref().map(|value| value.clone_ref(py))
    }

    pub fn write(&self, slot: usize, value: Option<Py<PyAny>>) -> Option<Py<PyAny>> {
        let mut values = lock(&self.values);
        if values.len() <= slot {
            values.resize_with(slot + 1, || None);
        }
        std::mem::replace(&mut values[slot], value)
    }

    /// Stores `value` unless another thread was first; returns what the slot holds then.
    pub fn write_if_unset(&self, py: Python<'_>, slot: usize, value: Py<PyAny>) -> Py<PyAny> {
        let mut values = lock(&self.values);
        if values.len() <= slot {
            values.resize_with(slot + 1, || None);
        }
        if let Some(existing) = &values[slot] {
            let existing = existing.clone_ref(py);
            drop(values);
            return existing;
        }
        values[slot] = Some(value.clone_ref(py));
        value
    }

    fn take_all(&self) -> Vec<Option<Py<PyAny>>> {
        let mut values = lock(&self.values);
        std::mem::take(&mut *values)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::Relaxed);
        process::scopes().drop_scope(self.id);
        process::registry().remove(&Key::Experts(self.id.0.to_string()));
    }
}

#[pymethods]
impl Scope {
    #[getter]
    fn id(&self) -> u64 {
        self.id.0
    }

    #[getter]
    fn label(&self) -> String {
        lock(&self.label).clone()
    }

    #[setter]
    fn set_label(&self, label: String) {
        *lock(&self.label) = label;
    }

    /// Drops every value the scope holds; globals read afterwards start afresh.
    pub fn clear(&self) {
        drop(self.take_all());
    }

    fn __repr__(&self) -> String {
        format!("<Scope {} {:?}>", self.id.0, self.label())
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // The collector must not block: a lock held elsewhere means the values are in use.
        if let Ok(values) = self.values.try_lock() {
            for value in values.iter().flatten() {
                visit.call(value)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        drop(self.take_all());
    }
}

thread_local! {
    /// How many runner methods this thread is inside of.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

fn context_var(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static VAR: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    VAR.get_or_try_init(py, || {
        let kwargs = PyDict::new(py);
        kwargs.set_item("default", py.None())?;
        let name = PyString::new(py, "sglang_distguard.scope");
        let var = py
            .import("contextvars")?
            .getattr("ContextVar")?
            .call((name,), Some(&kwargs))?;
        Ok(var.unbind())
    })
    .map(|var| var.bind(py))
}

/// The scope of the running thread or task; `None` is SGLang's default one.
pub fn current(py: Python<'_>) -> PyResult<Option<Bound<'_, Scope>>> {
    // The thread that has one has seen it made; a scope in a ContextVar is alive.
    if ALIVE.load(Ordering::Relaxed) == 0 {
        return Ok(None);
    }
    // The limited API has no PyContextVar_Get; the method call costs about 40 ns.
    let value = context_var(py)?.call_method0(intern!(py, "get"))?;
    if value.is_none() {
        return Ok(None);
    }
    Ok(Some(value.cast_into::<Scope>()?))
}

fn bind(py: Python<'_>, scope: Option<&Bound<'_, Scope>>) -> PyResult<Py<PyAny>> {
    let value = scope.map_or_else(|| py.None(), |scope| scope.clone().into_any().unbind());
    let token = context_var(py)?.call_method1(intern!(py, "set"), (value,))?;
    Ok(token.unbind())
}

/// The scope of the running thread or task; None is SGLang's default one.
#[pyfunction]
pub fn current_scope(py: Python<'_>) -> PyResult<Option<Bound<'_, Scope>>> {
    current(py)
}

/// Makes `scope` the running thread's own until it is changed again.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn adopt_scope(py: Python<'_>, scope: Option<Bound<'_, Scope>>) -> PyResult<()> {
    bind(py, scope.as_ref()).map(drop)
}

/// Makes `scope` current; returns what `switch_back` needs (None when nothing changed).
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn switch(py: Python<'_>, scope: Option<Bound<'_, Scope>>) -> PyResult<Option<Py<PyAny>>> {
    let unchanged = match (current(py)?, &scope) {
        (None, None) => true,
        (Some(now), Some(wanted)) => now.is(wanted),
        _ => false,
    };
    if unchanged {
        return Ok(None);
    }
    bind(py, scope.as_ref()).map(Some)
}

/// Undoes the `switch` that returned `token`.
#[pyfunction]
#[pyo3(signature = (token, /))]
pub fn switch_back(py: Python<'_>, token: Option<Py<PyAny>>) -> PyResult<()> {
    if let Some(token) = token {
        context_var(py)?.call_method1(intern!(py, "reset"), (token,))?;
    }
    Ok(())
}

/// `switch` for a runner's method: the thread counts as inside one until `leave`.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn enter(py: Python<'_>, scope: Option<Bound<'_, Scope>>) -> PyResult<Option<Py<PyAny>>> {
    exit::going_in(py, depth() == 0);
    let token = match switch(py, scope) {
        Ok(token) => token,
        Err(error) => {
            if depth() == 0 {
                exit::came_out();
            }
            return Err(error);
        }
    };
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    Ok(token)
}

/// Undoes the `enter` that returned `token`; returns how deep the thread still is.
#[pyfunction]
#[pyo3(signature = (token, /))]
pub fn leave(py: Python<'_>, token: Option<Py<PyAny>>) -> PyResult<usize> {
    let depth = DEPTH.with(|depth| {
        let now = depth.get().checked_sub(1);
        depth.set(now.unwrap_or(0));
        now
    });
    let Some(depth) = depth else {
        return Err(PyRuntimeError::new_err(
            "leave() without a matching enter()",
        ));
    };
    if depth == 0 {
        exit::came_out();
    }
    switch_back(py, token)?;
    Ok(depth)
}

/// How many runner methods the calling thread is inside of.
#[pyfunction]
pub fn depth() -> usize {
    DEPTH.with(Cell::get)
}

/// Scopes that are alive, for whoever has to find one by what it holds.
static LIVE: Mutex<Vec<Py<PyWeakrefReference>>> = Mutex::new(Vec::new());

fn live() -> MutexGuard<'static, Vec<Py<PyWeakrefReference>>> {
    lock(&LIVE)
}

fn register(py: Python<'_>, id: ScopeId, label: String) -> PyResult<Bound<'_, Scope>> {
    let scope = Bound::new(py, Scope::new(id, label))?;
    let weak = PyWeakrefReference::new(&scope)?.unbind();
    live().push(weak);
    Ok(scope)
}

/// The scopes that are alive, oldest first, without SGLang's default one.
#[pyfunction]
pub fn live_scopes(py: Python<'_>) -> Vec<Bound<'_, Scope>> {
    let known: Vec<_> = live().iter().map(|weak| weak.clone_ref(py)).collect();
    // Upgraded without the lock: that may run Python.
    let (found, ended): (Vec<_>, Vec<_>) = known
        .into_iter()
        .map(|weak| (weak.bind(py).upgrade(), weak))
        .partition(|(scope, _)| scope.is_some());
    if !ended.is_empty() {
        let mut now = live();
        let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut *now)
            .into_iter()
            .partition(|weak| ended.iter().any(|(_, gone)| gone.is(weak)));
        *now = kept;
        drop(now);
        drop(gone); // only now: dropping a weak reference may run Python, too
    }
    found
        .into_iter()
        .filter_map(|(scope, _)| scope?.cast_into::<Scope>().ok())
        .collect()
}

/// A scope that nobody publishes in; its context comes from elsewhere.
#[pyfunction]
pub fn new_scope(py: Python<'_>, label: String) -> PyResult<Bound<'_, Scope>> {
    register(py, process::scopes().with(ScopeLedger::create), label)
}

fn current_id(py: Python<'_>) -> PyResult<ScopeId> {
    Ok(current(py)?.map_or(DEFAULT, |scope| scope.get().id))
}

/// Which scope a `publish` of the calling thread configures, and whether that is a fresh one.
#[pyfunction]
pub fn choose_scope(py: Python<'_>, label: String) -> PyResult<(Option<Bound<'_, Scope>>, bool)> {
    let (now, thread) = (current_id(py)?, convert::thread_id(py)?);
    let is_alive = |other| convert::is_alive(py, other);
    match process::scopes().publish(now, thread, is_alive)? {
        Publish::Replace(_) => Ok((current(py)?, false)),
        Publish::New(id) => Ok((Some(register(py, id, label)?), true)),
    }
}

/// The calling thread's publish in `scope` failed: others may publish there again.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn abandon_scope(py: Python<'_>, scope: Option<Bound<'_, Scope>>) -> PyResult<()> {
    let id = scope.map_or(DEFAULT, |scope| scope.get().id);
    let thread = convert::thread_id(py)?;
    process::scopes().with(|ledger| ledger.abandon(id, thread));
    Ok(())
}

/// Whether `scope`, in which nobody builds or runs, is the calling thread's until `abandon_scope`.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn claim_vacant(py: Python<'_>, scope: Option<Bound<'_, Scope>>) -> PyResult<bool> {
    let id = scope.map_or(DEFAULT, |scope| scope.get().id);
    let thread = convert::thread_id(py)?;
    Ok(process::scopes().with(|ledger| ledger.claim_vacant(id, thread)))
}

/// The current scope uses this generation of `key` from now on.
#[pyfunction]
pub fn note_joined(py: Python<'_>, key: &str, generation: &Bound<'_, PyInt>) -> PyResult<()> {
    let generation = convert::whole("generation", generation)?;
    let (key, scope) = (convert::key(key)?, current_id(py)?);
    process::scopes().with(|ledger| ledger.join(scope, key, generation));
    Ok(())
}

/// Whether the current scope has joined `key`, be it torn down since or not.
#[pyfunction]
pub fn has_joined(py: Python<'_>, key: &str) -> PyResult<bool> {
    let (key, scope) = (convert::key(key)?, current_id(py)?);
    Ok(process::scopes().with(|ledger| ledger.joined(scope, &key).is_some()))
}

/// How many runners live in `scope`.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn live_runners(scope: Option<Bound<'_, Scope>>) -> usize {
    let id = scope.map_or(DEFAULT, |scope| scope.get().id);
    process::scopes().with(|ledger| ledger.live(id))
}
