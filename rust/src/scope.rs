//! Scopes: each is one view of SGLang's process-globals (`execution` says which one is current).
//! Holds values and decides nothing: `distguard_core::scopes` decides which code gets a new scope.

use std::sync::atomic::Ordering;
use std::sync::Mutex;

use distguard_core::key::Key;
use distguard_core::scopes::{ScopeId, ScopeLedger, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::PyInt;
use pyo3::{PyTraverseError, PyVisit};

use crate::attached::Attached;
use crate::convert;
use crate::early_reads;
use crate::execution;
use crate::process;
use crate::read_path::READ_PATH;
use crate::scoped_global;
use crate::sync::lock;
use crate::weak_list::WeakList;

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
    fn value(&self) -> Option<&Py<PyAny>> {
        match self {
            Self::Value(value) => Some(value),
            Self::Unset | Self::Deleted => None,
        }
    }

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
    /// Indexed by `ScopedGlobal` slot. Never in use while Python runs: a value that is replaced is
    /// dropped afterwards.
    values: Attached<Vec<Held>>,
    _counted: Counted,
}

/// One scope more that exists, or is about to: no code reads scoped globals directly.
pub struct Counted(());

impl Counted {
    /// Runs audit hooks, if there are any.
    pub fn new(py: Python<'_>) -> PyResult<Self> {
        READ_PATH.scopes.fetch_add(1, Ordering::Relaxed);
        let counted = Self(());
        scoped_global::tell_modules(py)?;
        early_reads::read_through_accessors(py)?;
        Ok(counted)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let before = READ_PATH.scopes.fetch_sub(1, Ordering::Relaxed);
        if before == 1 {
            // A module that is not told reads through its accessors, which is right, too.
            Python::attach(|py| drop(scoped_global::tell_modules(py)));
        }
    }
}

impl Scope {
    fn new(id: ScopeId, label: String, counted: Counted) -> Self {
        Self {
            id,
            label: Mutex::new(label),
            values: Attached::default(),
            _counted: counted,
        }
    }

    pub fn scope_id(&self) -> ScopeId {
        self.id
    }

    #[inline]
    pub fn read(&self, py: Python<'_>, slot: usize) -> Held {
        self.values.with(py, |values| {
            let held = values.get(slot);
            held.map_or(Held::Unset, |held| held.clone_ref(py))
        })
    }

    /// Stores `held`; returns the former content of the slot.
    pub fn write(&self, py: Python<'_>, slot: usize, held: Held) -> Held {
        self.values.with(py, |values| {
            if values.len() <= slot {
                values.resize_with(slot + 1, Held::default);
            }
            std::mem::replace(&mut values[slot], held)
        })
    }

    /// Stores `value` unless another thread wrote or deleted first; returns the resulting content.
    pub fn write_if_unset(&self, py: Python<'_>, slot: usize, value: Py<PyAny>) -> Held {
        match self.read(py, slot) {
            Held::Unset => {
                drop(self.write(py, slot, Held::Value(value.clone_ref(py))));
                Held::Value(value)
            }
            existing => existing,
        }
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
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
    pub fn clear(&self, py: Python<'_>) {
        drop(self.values.with(py, std::mem::take));
    }

    fn __repr__(&self) -> String {
        format!("<Scope {} {:?}>", self.id.0, self.label())
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let each = |values: &Vec<Held>| {
            let mut values = values.iter().filter_map(Held::value);
            values.try_for_each(|value| visit.call(value))
        };
        // SAFETY: the interpreter calls this, so the thread is attached.
        unsafe { self.values.peek(each) }.unwrap_or(Ok(()))
    }

    fn __clear__(&self, py: Python<'_>) {
        self.clear(py);
    }
}

/// Whether all code runs in SGLang's default scope, known without a look at the execution.
#[inline]
pub fn no_scope_exists() -> bool {
    // A scope in an execution is alive, and the thread that has it has seen its creation.
    READ_PATH.scopes.load(Ordering::Relaxed) == 0
}

/// Calls `look` with the running code's scope; `None`, without a call, in SGLang's default scope.
#[inline]
fn in_current<T>(py: Python<'_>, look: impl FnOnce(&Py<Scope>) -> T) -> PyResult<Option<T>> {
    let execution = execution::current(py)?;
    Ok(execution.and_then(|it| it.get().scope.as_ref().map(look)))
}

/// The scope of the running code; `None` is SGLang's default one.
pub fn current(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    if no_scope_exists() {
        return Ok(None);
    }
    in_current(py, |scope| scope.clone_ref(py))
}

/// The content of `slot` in the running code's scope; `None` in the default one. Runs no Python.
#[inline]
pub fn current_value(py: Python<'_>, slot: usize) -> PyResult<Option<Held>> {
    in_current(py, |scope| scope.get().read(py, slot))
}

/// The scope of the running code; None is SGLang's default one.
#[pyfunction]
pub fn current_scope(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    current(py)
}

/// Scopes that are alive, for code that must find a scope by its values.
static LIVE: WeakList = WeakList::new();

/// Makes a scope of the ledger. Runs no Python, unless the garbage collector does.
pub fn made(
    py: Python<'_>,
    id: ScopeId,
    label: String,
    counted: Counted,
) -> PyResult<Bound<'_, Scope>> {
    let scope = Bound::new(py, Scope::new(id, label, counted))?;
    LIVE.push(&scope)?;
    Ok(scope)
}

/// The scopes that are alive, oldest first, without SGLang's default one.
#[pyfunction]
pub fn live_scopes(py: Python<'_>) -> Vec<Bound<'_, Scope>> {
    LIVE.live(py)
}

/// Makes a scope in which no code publishes; its context comes from elsewhere.
#[pyfunction]
pub fn new_scope(py: Python<'_>, label: String) -> PyResult<Bound<'_, Scope>> {
    let counted = Counted::new(py)?;
    made(
        py,
        process::scopes().with(ScopeLedger::create),
        label,
        counted,
    )
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
    process::scopes().with(|ledger| ledger.live_runners(id))
}

/// How many residents `scope` has: runners and managers.
#[pyfunction]
#[pyo3(signature = (scope, /))]
#[allow(clippy::needless_pass_by_value)]
pub fn live_residents(scope: Option<Bound<'_, Scope>>) -> usize {
    let id = id_of(scope.as_ref());
    process::scopes().with(|ledger| ledger.live(id))
}
