//! Whose code is running: one immutable `Execution` in one `ContextVar`, so that threads, tasks
//! and all other carriers of a context carry all of it. No thread and no depth decides it.
//!
//! None in the variable stands for code of no runner, which reads SGLang's default scope.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};

use distguard_core::scopes::{ScopeId, DEFAULT};
use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::claim::Claim;
use crate::dtype::{self, HeldDtype};
use crate::read_path::READ_PATH;
use crate::runner::RunnerHandle;
use crate::scope::Scope;
use crate::step::Running;
use crate::sync::lock;

/// Whose code is running, and what it carries. Immutable: a change makes a new execution.
#[pyclass(frozen, module = "sglang_distguard._core")]
#[derive(Default)]
pub struct Execution {
    /// None is SGLang's default scope.
    pub scope: Option<Py<Scope>>,
    /// The runner whose method or `activate` block the code is in.
    pub runner: Option<Py<RunnerHandle>>,
    /// How many runner methods and `activate` blocks the code is nested in.
    pub depth: usize,
    /// The innermost method; gone when it has ended, even if a copied context lives on.
    pub step: Weak<Running>,
    /// What torch would call the default dtype; None: the process's.
    pub default_dtype: Option<Arc<HeldDtype>>,
    /// Whether variables that SGLang's `envs` write belong to the scope, not to the process.
    pub owns_environment: bool,
    /// The turn of this rank that the code is in; see `ranks.agreement`.
    pub turn: Option<Py<PyAny>>,
    /// The claim of its publish.
    pub claim: Option<Arc<Claim>>,
}

impl Execution {
    fn copy(&self, py: Python<'_>) -> Self {
        Self {
            scope: self.scope.as_ref().map(|it| it.clone_ref(py)),
            runner: self.runner.as_ref().map(|it| it.clone_ref(py)),
            depth: self.depth,
            step: self.step.clone(),
            default_dtype: self.default_dtype.clone(),
            owns_environment: self.owns_environment,
            turn: self.turn.as_ref().map(|it| it.clone_ref(py)),
            claim: self.claim.clone(),
        }
    }

    pub fn scope_id(&self) -> ScopeId {
        let scope = self.scope.as_ref();
        scope.map_or(DEFAULT, |scope| scope.get().scope_id())
    }
}

#[pymethods]
impl Execution {
    #[getter]
    fn scope(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|it| it.clone_ref(py))
    }

    #[getter]
    fn runner(&self, py: Python<'_>) -> Option<Py<RunnerHandle>> {
        self.runner.as_ref().map(|it| it.clone_ref(py))
    }

    #[getter]
    fn depth(&self) -> usize {
        self.depth
    }

    /// The name of the running method, if there is one.
    #[getter]
    fn step(&self) -> Option<String> {
        self.step.upgrade().map(|step| step.name().to_owned())
    }

    #[getter]
    fn default_dtype(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.default_dtype.as_ref().map(|it| it.dtype.clone_ref(py))
    }

    #[getter]
    fn turn(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.turn.as_ref().map(|it| it.clone_ref(py))
    }

    /// Whether environment variables that are set belong to a scope, not to the process.
    #[getter]
    fn owns_environment(&self) -> bool {
        self.owns_environment || self.scope.is_some() || self.runner.is_some()
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let runner = self.runner.as_ref();
        let runner = runner.map_or("no runner", |it| it.bind(py).get().name());
        format!(
            "<Execution of {runner} in scope {}, depth {}>",
            self.scope_id().0,
            self.depth
        )
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.turn.as_ref().map_or(Ok(()), |it| visit.call(it))?;
        self.scope.as_ref().map_or(Ok(()), |it| visit.call(it))?;
        self.runner.as_ref().map_or(Ok(()), |it| visit.call(it))
    }
}

/// Makes the context variable, once: the interpreter runs a module's initialisation once.
pub fn make_variable(py: Python<'_>) -> PyResult<()> {
    let name = c"sglang_distguard.execution";
    // SAFETY: attached; the name is terminated, the default is borrowed; a new reference or null
    // with an exception comes back, which `from_owned_ptr_or_err` tells apart.
    let made = unsafe {
        let made = ffi::PyContextVar_New(name.as_ptr(), ffi::Py_None());
        Bound::from_owned_ptr_or_err(py, made)?
    };
    READ_PATH.variable.store(made.into_ptr(), Ordering::Release);
    Ok(())
}

#[inline]
fn variable() -> *mut ffi::PyObject {
    READ_PATH.variable.load(Ordering::Relaxed)
}

/// The exception that a context variable has raised.
#[cold]
fn raised(py: Python<'_>) -> PyErr {
    PyErr::fetch(py)
}

/// The execution of the running code.
#[inline]
pub fn current(py: Python<'_>) -> PyResult<Option<Bound<'_, Execution>>> {
    let mut value = std::ptr::null_mut();
    // SAFETY: attached; `variable` is a context variable that is never freed. It has a default, so
    // that a new reference comes back unless an exception does.
    let value = unsafe {
        if ffi::PyContextVar_Get(variable(), std::ptr::null_mut(), &raw mut value) < 0 {
            return Err(raised(py));
        }
        Bound::from_owned_ptr(py, value)
    };
    if value.is_none() {
        return Ok(None);
    }
    // SAFETY: the variable is private to this file, and `set` puts nothing else into it.
    Ok(Some(unsafe { value.cast_into_unchecked() }))
}

/// Makes `execution` current; returns the token that `reset` needs.
fn set<'py>(
    py: Python<'py>,
    execution: Option<&Bound<'py, Execution>>,
) -> PyResult<Bound<'py, PyAny>> {
    let value = execution.map_or_else(|| py.None().into_bound(py), |it| it.clone().into_any());
    // SAFETY: attached; both are alive; a new reference or null with an exception comes back.
    unsafe {
        let token = ffi::PyContextVar_Set(variable(), value.as_ptr());
        Bound::from_owned_ptr_or_err(py, token)
    }
}

fn reset(py: Python<'_>, token: &Py<PyAny>) -> PyResult<()> {
    // SAFETY: attached; both are alive; anything but a token of the variable is refused.
    let done = unsafe { ffi::PyContextVar_Reset(variable(), token.as_ptr()) };
    if done < 0 {
        return Err(raised(py));
    }
    Ok(())
}

/// A changed copy of the running execution.
pub fn derived(
    py: Python<'_>,
    change: impl FnOnce(&mut Execution),
) -> PyResult<Bound<'_, Execution>> {
    let mut made = match current(py)? {
        Some(now) => now.get().copy(py),
        None => Execution::default(),
    };
    change(&mut made);
    Bound::new(py, made)
}

/// Replaces the running execution permanently by a changed copy.
pub fn change(py: Python<'_>, change: impl FnOnce(&mut Execution)) -> PyResult<()> {
    let made = derived(py, change)?;
    set(py, Some(&made)).map(drop)
}

/// The former execution, which an entered one has replaced; `leave` restores it.
pub struct Entry(Py<PyAny>);

impl Entry {
    pub fn new<'py>(py: Python<'py>, execution: Option<&Bound<'py, Execution>>) -> PyResult<Self> {
        Ok(Self(set(py, execution)?.unbind()))
    }

    /// Restores the former execution; stops intercepting torch if no execution needs it.
    pub fn leave(self, py: Python<'_>) -> PyResult<()> {
        let left = reset(py, &self.0);
        drop(self);
        dtype::settle(py)?;
        left
    }
}

/// The execution of the running code; None outside of every runner and scope.
#[pyfunction]
pub fn current_execution(py: Python<'_>) -> PyResult<Option<Bound<'_, Execution>>> {
    current(py)
}

/// The running execution, to be carried to another thread.
#[pyfunction]
pub fn carried_execution(py: Python<'_>) -> PyResult<Option<Bound<'_, Execution>>> {
    let Some(now) = current(py)? else {
        return Ok(None);
    };
    let Some(dtype) = &now.get().default_dtype else {
        return Ok(Some(now));
    };
    let dtype = dtype.carried(py);
    derived(py, |it| it.default_dtype = Some(dtype)).map(Some)
}

/// Makes `execution` current for the calling code until it is changed again.
#[pyfunction]
#[pyo3(signature = (execution, /))]
#[allow(clippy::needless_pass_by_value)]
pub fn adopt_execution(py: Python<'_>, execution: Option<Bound<'_, Execution>>) -> PyResult<()> {
    set(py, execution.as_ref()).map(drop)
}

/// How many runner methods and `activate` blocks the running code is in.
#[pyfunction]
pub fn depth(py: Python<'_>) -> PyResult<usize> {
    Ok(current(py)?.map_or(0, |it| it.get().depth))
}

/// Makes `dtype` the default dtype of the running execution; None: the process's again.
#[pyfunction]
#[pyo3(signature = (dtype, /))]
pub fn set_default_dtype(py: Python<'_>, dtype: Option<Py<PyAny>>) -> PyResult<()> {
    change(py, |it| it.default_dtype = dtype.map(HeldDtype::new))?;
    dtype::settle(py)
}

/// The default dtype of the running execution; None: the process's.
#[pyfunction]
pub fn default_dtype_in_force(py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
    Ok(current(py)?.and_then(|it| it.get().default_dtype(py)))
}

/// How a `with` block of `Entered` changes the running execution.
enum Wanted {
    /// This one, regardless of the running one.
    This(Option<Py<Execution>>),
    Scope(Option<Py<Scope>>),
    OwnEnvironment,
    DefaultDtype(Option<Py<PyAny>>),
    Turn(Option<Py<PyAny>>),
}

/// A context manager that makes another execution current, in one native step.
///
/// Dropping it without `__exit__` (an interrupt may come at any bytecode) leaves the block, too.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Entered {
    wanted: Wanted,
    entries: Mutex<Vec<Entry>>,
}

impl Entered {
    fn new(wanted: Wanted) -> Self {
        Self {
            wanted,
            entries: Mutex::default(),
        }
    }
}

#[pymethods]
impl Entered {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        let scope_of = |it: &Option<Py<Scope>>| it.as_ref().map(|it| it.clone_ref(py));
        let wanted = match &self.wanted {
            Wanted::This(execution) => execution.as_ref().map(|it| it.bind(py).clone()),
            Wanted::Scope(scope) => Some(derived(py, |it| {
                let same =
                    it.scope.as_ref().map(pyo3::Py::as_ptr) == scope.as_ref().map(pyo3::Py::as_ptr);
                if !same {
                    // A runner's claim and step belong to its scope.
                    *it = Execution {
                        default_dtype: it.default_dtype.take(),
                        turn: it.turn.take(),
                        depth: it.depth,
                        ..Execution::default()
                    };
                }
                it.scope = scope_of(scope);
            })?),
            Wanted::OwnEnvironment => Some(derived(py, |it| it.owns_environment = true)?),
            Wanted::DefaultDtype(dtype) => Some(derived(py, |it| {
                let dtype = dtype.as_ref().map(|it| it.clone_ref(py));
                it.default_dtype = dtype.map(HeldDtype::new);
            })?),
            Wanted::Turn(turn) => Some(derived(py, |it| {
                it.turn = turn.as_ref().map(|it| it.clone_ref(py));
            })?),
        };
        let entry = Entry::new(py, wanted.as_ref())?;
        lock(&self.entries).push(entry);
        Ok(())
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, pyo3::types::PyTuple>) -> PyResult<()> {
        let entry = lock(&self.entries).pop();
        entry.map_or_else(
            || {
                Err(PyRuntimeError::new_err(
                    "this with block was left more often than it was entered",
                ))
            },
            |entry| entry.leave(py),
        )
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let entries = std::mem::take(&mut *lock(&self.entries));
        if entries.is_empty() {
            return;
        }
        Python::attach(|py| {
            for entry in entries.into_iter().rev() {
                // Fails in another context, or too late: then there is nothing to undo here.
                let _ = entry.leave(py);
            }
        });
    }
}

/// Runs a with block as `execution` itself.
#[pyfunction]
#[pyo3(signature = (execution, /))]
pub fn run_as(execution: Option<Py<Execution>>) -> Entered {
    Entered::new(Wanted::This(execution))
}

/// Makes `scope` current for a with block; code in it belongs to no runner yet.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn in_scope(scope: Option<Py<Scope>>) -> Entered {
    Entered::new(Wanted::Scope(scope))
}

/// Treats environment variables set in a with block as a runner's, in the default scope, too.
#[pyfunction]
pub fn owning_environment() -> Entered {
    Entered::new(Wanted::OwnEnvironment)
}

/// Makes `turn` the turn of a with block.
#[pyfunction]
#[pyo3(signature = (turn, /))]
pub fn in_turn(turn: Option<Py<PyAny>>) -> Entered {
    Entered::new(Wanted::Turn(turn))
}

/// Makes `dtype` the default dtype of a with block.
#[pyfunction]
#[pyo3(signature = (dtype, /))]
pub fn with_default_dtype(dtype: Option<Py<PyAny>>) -> Entered {
    Entered::new(Wanted::DefaultDtype(dtype))
}
