//! A step in a turn that is in force, such as a block of several steps. What `collective_steps` does
//! in Python for any step, this does in one native step while nothing refuses it: a model that
//! decodes calls two of them for each token. Whatever is unusual is left to Python.

use std::sync::Mutex;

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};

use crate::runner::RunnerHandle;
use crate::step::{refuse_entered, Step};
use crate::sync::lock;

/// A claim of the communicators of a runner's scope, until it is dropped.
struct Claimed(Py<RunnerHandle>);

impl Claimed {
    /// Claims them; also whether the calling thread had not done so before.
    fn new(py: Python<'_>, handle: &Py<RunnerHandle>) -> PyResult<(Self, bool)> {
        let is_outermost = handle.get().begin_collectives(py)?;
        Ok((Self(handle.clone_ref(py)), is_outermost))
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        self.0.get().end_collectives();
    }
}

/// How a step was entered.
enum Entered {
    Here(Vec<Claimed>),
    /// The context manager that Python code has made.
    InPython(Py<PyAny>),
}

/// A context manager: a step that computes with other ranks, within the turn of the running code.
///
/// Dropping it without `__exit__` (an interrupt may come at any bytecode) leaves the step, too.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct StepInTurn {
    step: Step,
    handle: Py<RunnerHandle>,
    /// `ranks.ask.Ask` of the turn, and the `_Users` that it keeps.
    turn: Py<PyAny>,
    users: Py<PyAny>,
    /// The runner that has taken the turn: one thread at a time is in a step there.
    first: Py<RunnerHandle>,
    otherwise: Py<PyAny>,
    entered: Mutex<Option<Entered>>,
}

impl StepInTurn {
    /// Makes it for `step`; None if `turn` is not one of steps, or its runner is new there.
    pub fn find(
        py: Python<'_>,
        handle: &Bound<'_, RunnerHandle>,
        turn: &Bound<'_, PyAny>,
        step: Step,
        otherwise: &Py<PyAny>,
    ) -> PyResult<Option<Self>> {
        let users = turn.getattr(intern!(py, "users"))?;
        let Some(handles) = users.getattr_opt(intern!(py, "handles"))? else {
            return Ok(None);
        };
        let handles = handles.cast_into::<PyList>()?;
        if !handles.iter().any(|it| it.is(handle)) {
            return Ok(None);
        }
        let first = handles.get_item(0)?.cast_into::<RunnerHandle>()?;
        Ok(Some(Self {
            step,
            handle: handle.clone().unbind(),
            turn: turn.clone().unbind(),
            users: users.unbind(),
            first: first.unbind(),
            otherwise: otherwise.clone_ref(py),
            entered: Mutex::default(),
        }))
    }

    /// Claims the communicators; None if the step is refused, or is within another one of its runner.
    fn claim(&self, py: Python<'_>) -> PyResult<Option<Vec<Claimed>>> {
        let Ok((mine, true)) = Claimed::new(py, &self.handle) else {
            return Ok(None);
        };
        let mut claims = vec![mine];
        if !self.first.is(&self.handle) {
            let Ok((its, _)) = Claimed::new(py, &self.first) else {
                return Ok(None);
            };
            claims.push(its);
        }
        // Read when the runner is one of the turn's users (`collective_steps._refuse_if_ended`).
        let turn = self.turn.bind(py);
        let is_over = turn.getattr(intern!(py, "has_left_turn"))?.is_truthy()?
            || turn.getattr(intern!(py, "was_ended"))?.is_truthy()?;
        Ok((!is_over).then_some(claims))
    }

    /// Tells the turn that the step raised, or was refused.
    fn tell(&self, py: Python<'_>, method: &str, error: &Bound<'_, PyAny>) -> PyResult<()> {
        let users = self.users.bind(py);
        users.call_method1(method, (&self.handle, error)).map(drop)
    }
}

#[pymethods]
impl StepInTurn {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        refuse_entered(&self.entered)?;
        self.handle.get().check(py)?;
        let entered = if let Some(claims) = self.claim(py)? {
            if let Err(error) = self.step.enter(py) {
                self.tell(py, "refuse", error.value(py).as_any())?;
                return Err(error);
            }
            Entered::Here(claims)
        } else {
            let name = self.step.name();
            let other = self.otherwise.call1(py, (&self.handle, name))?;
            other.call_method0(py, intern!(py, "__enter__"))?;
            Entered::InPython(other)
        };
        *lock(&self.entered) = Some(entered);
        Ok(())
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        class: &Bound<'_, PyAny>,
        error: &Bound<'_, PyAny>,
        trace: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let entered = lock(&self.entered).take();
        let claims = match entered {
            None => return Err(PyRuntimeError::new_err("this step is not entered")),
            Some(Entered::InPython(other)) => {
                let given = (class, error, trace);
                let left = other.call_method1(py, intern!(py, "__exit__"), given)?;
                return left.bind(py).is_truthy();
            }
            Some(Entered::Here(claims)) => claims,
        };
        let left = self.step.leave(py);
        if !error.is_none() {
            self.tell(py, "fail", error)?;
        } else if let Err(error) = &left {
            self.tell(py, "fail", error.value(py).as_any())?;
        }
        drop(claims);
        left.map(|_| false)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.step.visit(&visit)?;
        visit.call(&self.handle)?;
        visit.call(&self.turn)?;
        visit.call(&self.users)?;
        visit.call(&self.first)?;
        visit.call(&self.otherwise)
    }
}

impl Drop for StepInTurn {
    fn drop(&mut self) {
        let entered = lock(&self.entered).take();
        if entered.is_some() {
            Python::attach(|py| {
                drop(self.step.leave(py));
                drop(entered);
            });
        }
    }
}
