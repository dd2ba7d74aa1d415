//! Scopes: each is one view of SGLang's process-globals (`execution` says which one is current).
//! Holds values and decides nothing: `distguard_core::scopes` decides which code gets a new scope.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use distguard_core::key::Key;
use distguard_core::scopes::{ScopeId, ScopeLedger, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{PyTraverseError, PyVisit};

use crate::convert;
use crate::execution;
use crate::process;
use crate::sync::lock;

/// The state of one global in a scope.
#[derive(Default)]
pub enum Held {
    /// Not yet read or written in this scope: its value is the initial one.
    #[default]
    Unset,
    Value(Py<PyAny>),
    /// Deleted in this scope, and not written since.
    Deleted,
}

impl Held {
    fn clone_ref(&self, py: Python<'_>) -> Self {
        match self {
            Self::Unset => Self::Unset,
            Self::Value(value) => Self::Value(value.clone_ref(py)),
            Self::Deleted => Self::Deleted,
        }
    }
}

/// One runner's own values of SGLang's module globals.
///
/// SGLang's default scope, the module globals themselves, has no `Scope`: it is `None`.
#[pyclass(frozen, weakref, module = "sglang_distguard._core")]
pub struct Scope {
    id: ScopeId,
    label: Mutex<String>,
    /// Indexed by `ScopedGlobal` slot.
    /// Never locked while Python runs: a value that is replaced is dropped after unlocking.
    values: Mutex<Vec<Held>>,
}

/// How many scopes exist. At 0 the running code must be in the default scope, without a look-up.
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

    pub fn read(&self, py: Python<'_>, slot: usize) -> Held {
        let values = lock(&self.values);
        values
            .get(slot)
            .map_or(Held::Unset, |held| held.clone_ref(py))
    }

    /// Stores `held`; returns the former content of the slot.
    pub fn write(&self, slot: usize, held: Held) -> Held {
        let mut values = lock(&self.values);
        if values.len() <= slot {
            values.resize_with(slot + 1, Held::default);
        }
        std::mem::replace(&mut values[slot], held)
    }

    /// Stores `value` unless another thread wrote or deleted first; returns the resulting content.
    pub fn write_if_unset(&self, py: Python<'_>, slot: usize, value: Py<PyAny>) -> Held {
        let mut values = lock(&self.values);
        if values.len() <= slot {
            values.resize_with(slot + 1, Held::default);
        }
        if matches!(values[slot], Held::Unset) {
            values[slot] = Held::Value(value.clone_ref(py));
            return Held::Value(value);
        }
        let existing = values[slot].clone_ref(py);
        drop(values); // `value` is dropped after unlocking
        existing
    }

    fn take_all(&self) -> Vec<Held> {
        let mut values = lock(&self.values);
        std::mem::take(&mut *values)
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        ALIVE.fetch_sub(1, Ordering::Relaxed);
        process::scopes().with(|ledger| ledger.drop_scope(self.id));
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

    /// Drops every value the scope holds; a global that is read afterwards gets its initial value.
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
            for held in values.iter() {
                if let Held::Value(value) = held {
                    visit.call(value)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        drop(self.take_all());
    }
}

/// Calls `look` with the running code's scope; `None`, without a call, in SGLang's default scope.
fn in_current<T>(py: Python<'_>, look: impl FnOnce(&Py<Scope>) -> T) -> PyResult<Option<T>> {
    // A scope in an execution is alive, and the thread that has it has seen its creation.
    if ALIVE.load(Ordering::Relaxed) == 0 {
        return Ok(None);
    }
    let execution = execution::current(py)?;
    Ok(execution.and_then(|it| it.get().scope.as_ref().map(look)))
}

/// The scope of the running code; `None` is SGLang's default one.
pub fn current(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    in_current(py, |scope| scope.clone_ref(py))
}

/// The content of `slot` in the running code's scope; `None` in the default one. Runs no Python.
pub fn current_value(py: Python<'_>, slot: usize) -> PyResult<Option<Held>> {
    in_current(py, |scope| scope.get().read(py, slot))
}

/// The scope of the running code; None is SGLang's default one.
#[pyfunction]
pub fn current_scope(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    current(py)
}

/// Scopes that are alive, for code that must find a scope by its values.
static LIVE: Mutex<Vec<Py<PyWeakrefReference>>> = Mutex::new(Vec::new());

fn live() -> MutexGuard<'static, Vec<Py<PyWeakrefReference>>> {
    lock(&LIVE)
}

pub fn register(py: Python<'_>, id: ScopeId, label: String) -> PyResult<Bound<'_, Scope>> {
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

/// Makes a scope in which no code publishes; its context comes from elsewhere.
#[pyfunction]
pub fn new_scope(py: Python<'_>, label: String) -> PyResult<Bound<'_, Scope>> {
    register(py, process::scopes().with(ScopeLedger::create), label)
}

fn current_id(py: Python<'_>) -> PyResult<ScopeId> {
    Ok(current(py)?.map_or(DEFAULT, |scope| scope.get().id))
}

pub fn id_of(scope: Option<&Bound<'_, Scope>>) -> ScopeId {
    scope.map_or(DEFAULT, |scope| scope.get().id)
}

/// Notes that the current scope uses this generation of `key` from now on.
#[pyfunction]
pub fn note_joined(py: Python<'_>, key: &str, generation: &Bound<'_, PyInt>) -> PyResult<()> {
    let generation = convert::whole("generation", generation)?;
    let (key, scope) = (convert::key(key)?, current_id(py)?);
    process::scopes().with(|ledger| ledger.join(scope, key, generation));
    Ok(())
}

/// Whether the current scope has joined `key`, even if it was torn down since.
#[pyfunction]
pub fn has_joined(py: Python<'_>, key: &str) -> PyResult<bool> {
    let (key, scope) = (convert::key(key)?, current_id(py)?);
    Ok(process::scopes().with(|ledger| ledger.joined(scope, &key).is_some()))
}

/// How many runners live in `scope`.
#[pyfunction]
#[pyo3(signature = (scope, /))]
#[allow(clippy::needless_pass_by_value)]
pub fn live_runners(scope: Option<Bound<'_, Scope>>) -> usize {
    let id = id_of(scope.as_ref());
    process::scopes().with(|ledger| ledger.live(id))
}
