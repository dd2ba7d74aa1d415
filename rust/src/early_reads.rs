//! Functions that make all their reads of scoped globals at once have their own code while no scope
//! exists (`patching.early_reads`). This is the only place that gives it to them and takes it away.
//!
//! A scope is counted before `read_through_accessors`, and that returns before code enters the scope.
//! `give_own_code` looks at the count and sets the code in one go. An audit hook may run in between
//! (`object.__setattr__`), and with it other threads: so it looks again, and they wait until it has.

use std::sync::Mutex;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors;
use crate::scope::no_scope_exists;
use crate::sync::lock;

/// A function that has its own code now, and its code that reads through accessors.
struct Direct {
    function: Py<PyAny>,
    own: Py<PyAny>,
    code: Py<PyAny>,
}

impl Direct {
    fn clone_ref(&self, py: Python<'_>) -> Self {
        Self {
            function: self.function.clone_ref(py),
            own: self.own.clone_ref(py),
            code: self.code.clone_ref(py),
        }
    }

    /// Makes the function read through accessors, unless other code has replaced it meanwhile.
    fn take(&self, py: Python<'_>) -> PyResult<()> {
        let (attribute, names) = (intern!(py, "__code__"), intern!(py, "co_names"));
        let (function, own) = (self.function.bind(py), self.own.bind(py));
        let now = function.getattr(attribute)?;
        // A copy of its own code, such as one with a breakpoint, has the same names.
        if now.is(own) || now.getattr(names)?.eq(own.getattr(names)?)? {
            function.setattr(attribute, &self.code)?;
        }
        Ok(())
    }
}

static DIRECT: Mutex<Vec<Direct>> = Mutex::new(Vec::new());
/// The thread that is in `give_own_code`.
static GIVING: Mutex<Option<ThreadId>> = Mutex::new(None);
/// How long an audit hook may take.
const PATIENCE: Duration = Duration::from_secs(10);

struct Giving;

impl Giving {
    fn new() -> Self {
        *lock(&GIVING) = Some(thread::current().id());
        Self
    }
}

impl Drop for Giving {
    fn drop(&mut self) {
        *lock(&GIVING) = None;
    }
}

static AFTER_BUILDS: Mutex<Option<Py<PyAny>>> = Mutex::new(None);

/// Makes all functions read through accessors. Several threads may do so at once: each returns when
/// all functions do.
#[pyfunction]
pub fn read_through_accessors(py: Python<'_>) -> PyResult<()> {
    let all: Vec<_> = lock(&DIRECT).iter().map(|it| it.clone_ref(py)).collect();
    all.iter().try_for_each(|it| it.take(py))?;
    let mut direct = lock(&DIRECT);
    let is_done = |it: &Direct| all.iter().any(|done| done.function.is(&it.function));
    let (done, left): (Vec<_>, Vec<_>) =
        std::mem::take(&mut *direct).into_iter().partition(is_done);
    *direct = left;
    drop(direct);
    drop(done); // without the lock: that may run Python
    let (me, until) = (thread::current().id(), Instant::now() + PATIENCE);
    while lock(&GIVING).is_some_and(|giver| giver != me) {
        if Instant::now() > until {
            let message =
                "an audit hook of another thread has not returned for 10 s while the code of a \
                           function of SGLang was set. Nothing was changed. Look at what it does \
                           (py-spy dump)";
            return Err(errors::make(
                py,
                "AcquireTimeout",
                message,
                &PyDict::new(py),
            )?);
        }
        py.check_signals()?;
        py.detach(|| thread::sleep(Duration::from_micros(50)));
    }
    Ok(())
}

/// Gives `function`, whose `code` reads through accessors, its `own` code, unless a scope exists.
#[pyfunction]
pub fn give_own_code(
    py: Python<'_>,
    function: Bound<'_, PyAny>,
    own: Bound<'_, PyAny>,
    code: Py<PyAny>,
) -> PyResult<()> {
    if !no_scope_exists() {
        return Ok(());
    }
    let direct = Direct {
        function: function.clone().unbind(),
        own: own.clone().unbind(),
        code,
    };
    let _giving = Giving::new();
    lock(&DIRECT).push(direct.clone_ref(py));
    function.setattr(intern!(py, "__code__"), own)?;
    if no_scope_exists() {
        return Ok(());
    }
    direct.take(py) // the thread that took all others has not seen this one
}

/// Every build that ends while no scope exists calls `call`, until another one or None is named here.
#[pyfunction]
#[pyo3(signature = (call, /))]
pub fn call_after_builds(call: Option<Py<PyAny>>) {
    let before = std::mem::replace(&mut *lock(&AFTER_BUILDS), call);
    drop(before); // without the lock: that may run Python
}

/// Notes that a runner was built.
#[pyfunction]
pub fn note_build(py: Python<'_>) -> PyResult<()> {
    let call = lock(&AFTER_BUILDS).as_ref().map(|it| it.clone_ref(py));
    match call {
        Some(call) if no_scope_exists() => call.call0(py).map(drop),
        _ => Ok(()),
    }
}
