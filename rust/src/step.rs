//! One method of a runner, entered in one native step: leases, occupancy, phase, execution.
//! A method that is called from within its runner's own step goes straight through.

use std::cell::Cell;
use std::sync::{Arc, Mutex, Weak};

use distguard_core::actor::{Actor, ThreadId};
use distguard_core::calls::CallId;
use distguard_core::enter::Entry as Entrance;
use distguard_core::occupancy::Occupancy;
use distguard_core::phases::{Access, Phase, RunnerId, VisitId};
use pyo3::exceptions::{PyAttributeError, PyGeneratorExit, PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyString;
use pyo3::{intern, PyTraverseError, PyVisit};

use crate::calls::{self, Holding};
use crate::convert;
use crate::device::OnDevice;
use crate::errors::to_python;
use crate::execution::{self, Entry, Execution};
use crate::exit;
use crate::in_turn::StepInTurn;
use crate::phase::Visit;
use crate::process::{self, forks, registry};
use crate::runner::RunnerHandle;
use crate::sync::lock;
use crate::through::through;

/// The properties that all steps of one name share.
struct Kind {
    name: Arc<str>,
    phase: Option<Phase>,
    /// One thread at a time: a forward writes the runner's static buffers (sglang 0.5.23).
    exclusive: bool,
    /// Of a manager: whether its end waits for the method.
    counts: bool,
}

/// A step that has not ended; its executions refer to it weakly.
pub struct Running {
    kind: Arc<Kind>,
    runner: RunnerId,
    thread: ThreadId,
    visit: Option<VisitId>,
    /// The call, if it is a manager's step.
    call: Option<CallId>,
    /// The place that it occupies, if it is exclusive.
    occupies: Option<Arc<Mutex<Occupancy>>>,
    /// The step of another thread that entered the phase for this one, and so must last as long.
    _outer: Option<Arc<Running>>,
    forks: u32,
}

impl Running {
    pub fn name(&self) -> &str {
        &self.kind.name
    }

    /// Whether this step has everything that `kind` on `runner` needs.
    fn covers(&self, kind: &Kind, runner: RunnerId) -> bool {
        let phase = match (self.kind.phase, kind.phase) {
            (_, None) | (Some(Phase::Capture), _) | (Some(Phase::Load), Some(Phase::Forward)) => {
                true
            }
            (mine, wanted) => mine == wanted,
        };
        self.runner == runner && phase
    }
}

impl Drop for Running {
    /// Runs no Python.
    fn drop(&mut self) {
        // A forked child's registry is not the one that admitted this step.
        if self.forks != forks() {
            return;
        }
        if let Some(visit) = self.visit {
            registry().leave(visit);
        }
        if let Some(call) = self.call {
            process::calls().leave(call);
        }
        if let Some(place) = &self.occupies {
            lock(place).leave();
        }
    }
}

thread_local! {
    /// How many steps this thread is in: the exit waits for threads that are in one.
    static STEPS: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread is in a step.
pub fn is_inside() -> bool {
    STEPS.with(Cell::get) > 0
}

/// The parts of an entered step that are left when it ends.
struct Held {
    entry: Entry,
    device: Option<OnDevice>,
    /// Dropped last, when the caller's execution is current again.
    running: Arc<Running>,
    thread: ThreadId,
    /// The runner's CUDA stream, and what its `begin` returned.
    ordered: Option<(Py<PyAny>, Py<PyAny>)>,
}

/// A context manager: the running code is in a step of a runner.
///
/// Dropping it without `__exit__` (an interrupt may come at any bytecode) leaves the step, too.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Step {
    kind: Arc<Kind>,
    handle: Py<RunnerHandle>,
    held: Mutex<Option<Held>>,
}

impl Step {
    pub fn name(&self) -> &str {
        &self.kind.name
    }

    /// Enters the step; `leave` ends it, and so does dropping it.
    pub fn enter(&self, py: Python<'_>) -> PyResult<()> {
        refuse_entered(&self.held)?;
        let held = self.begin(py)?;
        *lock(&self.held) = Some(held);
        Ok(())
    }

    /// What a class that contains it visits in its own `__traverse__`.
    pub fn visit(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.handle)
    }

    fn begin(&self, py: Python<'_>) -> PyResult<Held> {
        let handle = self.handle.bind(py).get();
        let thread = convert::this_thread();
        exit::stop_if_exiting(py, is_inside());
        handle.check(py)?;
        let now = execution::current(py)?;
        let now = now.as_ref().map(Bound::get);
        let outer = now.and_then(|it| it.step.upgrade());
        let outer = outer.filter(|it| it.covers(&self.kind, handle.id()));
        let running = self.admit(py, handle, thread, outer.as_ref())?;
        let wanted = Execution {
            step: Arc::downgrade(&running),
            ..of_runner(py, &self.handle, now)
        };
        let entry = Entry::new(py, Some(&Bound::new(py, wanted)?))?;
        let device = match handle.on_device(py) {
            Ok(device) => device,
            Err(error) => {
                entry.leave(py)?;
                return Err(error);
            }
        };
        // After the phase has let it in, so that the stream has all that earlier steps have launched.
        let ordered = match self.kind.phase.and_then(|_| handle.stream(py)) {
            None => None,
            Some(stream) => match stream.call_method0(py, intern!(py, "begin")) {
                Ok(before) => Some((stream, before)),
                Err(error) => {
                    let restored = device.map_or(Ok(()), |it| it.restore(py));
                    entry.leave(py).and(restored)?;
                    return Err(error);
                }
            },
        };
        // The exit waits for no manager: event loops and suspended coroutines do not end by themselves.
        if !handle.is_managers() {
            let outermost = STEPS.with(|steps| steps.replace(steps.get() + 1)) == 0;
            exit::going_in(outermost);
        }
        Ok(Held {
            entry,
            device,
            running,
            thread,
            ordered,
        })
    }

    /// Enters occupancy and phase, as far as an outer step of the runner has not done so.
    fn admit(
        &self,
        py: Python<'_>,
        handle: &RunnerHandle,
        thread: ThreadId,
        outer: Option<&Arc<Running>>,
    ) -> PyResult<Arc<Running>> {
        let mine = |it: &&Arc<Running>| it.occupies.is_some() && it.thread == thread;
        let occupied = outer.as_ref().is_some_and(mine);
        if let Some(outer) = outer.filter(|_| occupied || !self.kind.exclusive) {
            // Keeps the outer step as long as this one, in case it is another thread's.
            return Ok(outer.clone());
        }
        let actor = convert::this_actor(py, Some(handle.name_ref()))?;
        let mut running = Running {
            kind: self.kind.clone(),
            runner: handle.id(),
            thread,
            visit: None,
            call: None,
            occupies: None,
            _outer: outer.cloned(),
            forks: forks(),
        };
        if handle.is_managers() && outer.is_none() {
            let step = self.kind.name.clone();
            running.call = Some(calls::enter(py, handle, step, self.kind.counts, &actor)?);
        }
        if self.kind.exclusive {
            running.occupies = Some(handle.occupy_for_forward(py, &actor)?);
        }
        if let Some(phase) = self.kind.phase.filter(|_| outer.is_none()) {
            let access = handle.access(phase);
            running.visit = Some(enter(py, access, &self.kind.name, &actor)?);
            handle.check(py)?; // the runner may have been closed meanwhile
        }
        Ok(Arc::new(running))
    }

    /// Leaves the step; false if it was not entered.
    pub fn leave(&self, py: Python<'_>) -> PyResult<bool> {
        let held = lock(&self.held).take();
        let Some(held) = held else {
            return Ok(false);
        };
        // Before the phase lets others in.
        let ended = held.ordered.map_or(Ok(()), |(stream, before)| {
            let name = intern!(py, "end");
            let ended = stream.call_method1(py, name, (&before,));
            if ended.is_err() {
                // Ctrl-C: without this the next step would overwrite what this one's kernels read.
                let _ = stream.call_method1(py, name, (&before,));
            }
            ended.map(drop)
        });
        let restored = held.device.map_or(Ok(()), |it| it.restore(py));
        let left = held.entry.leave(py).and(restored);
        let counted = !self.handle.bind(py).get().is_managers();
        if counted && held.thread == convert::this_thread() {
            let outermost = STEPS.with(|steps| {
                steps.set(steps.get().saturating_sub(1));
                steps.get() == 0
            });
            exit::came_out(outermost);
        }
        drop(held.running);
        left.and(ended).map(|()| true)
    }
}

/// The execution of `handle`'s runner, derived from `now`.
pub fn of_runner(py: Python<'_>, handle: &Py<RunnerHandle>, now: Option<&Execution>) -> Execution {
    // Settings made by one runner's code do not apply to another runner's.
    let same = now.filter(|it| it.runner.as_ref().is_some_and(|it| it.is(handle)));
    let turn = now.and_then(|it| it.turn.as_ref());
    Execution {
        scope: handle.bind(py).get().scope_ref(py),
        runner: Some(handle.clone_ref(py)),
        depth: now.map_or(0, |it| it.depth) + 1,
        step: same.map_or_else(Weak::default, |it| it.step.clone()),
        default_dtype: same.and_then(|it| it.default_dtype.clone()),
        owns_environment: true,
        turn: turn.map(|it| it.clone_ref(py)),
        claim: now.and_then(|it| it.claim.clone()),
    }
}

/// Enters a phase; waits, in Python code, if another visit is in the way.
fn enter(py: Python<'_>, access: Access, step: &Arc<str>, actor: &Actor) -> PyResult<VisitId> {
    let arrived = registry().arrive_in_step(access, Some(step.clone()), actor);
    let (id, entrance) = arrived.map_err(|error| to_python(py, &error))?;
    if entrance == Entrance::Inside {
        return Ok(id);
    }
    let visit = Bound::new(py, Visit::waiting(id, &entrance))?;
    let entered = py
        .import(intern!(py, "sglang_distguard.sync.waiting"))?
        .call_method1(intern!(py, "to_enter"), (&visit, access.to_string()));
    match entered {
        Ok(_) => Ok(visit.get().keep()),
        Err(error) => {
            visit.get().end();
            Err(error)
        }
    }
}

/// Refuses to enter a step again: `held` has what it must leave.
pub fn refuse_entered<T>(held: &Mutex<Option<T>>) -> PyResult<()> {
    if lock(held).is_some() {
        return Err(PyRuntimeError::new_err("this step is already entered"));
    }
    Ok(())
}

#[pymethods]
impl Step {
    fn __enter__(&self, py: Python<'_>) -> PyResult<()> {
        self.enter(py)
    }

    #[allow(clippy::used_underscore_binding)]
    fn __exit__(
        &self,
        py: Python<'_>,
        class: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        match self.leave(py) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            // A coroutine that is collected ends in whichever context collects it, where nothing was
            // entered and nothing is to be restored.
            Err(_) if class.is(py.get_type::<PyGeneratorExit>()) => return Ok(()),
            Err(error) => return Err(error),
        }
        Err(PyRuntimeError::new_err("this step is not entered"))
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.visit(&visit)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if lock(&self.held).is_some() {
            Python::attach(|py| drop(self.leave(py)));
        }
    }
}

/// Makes the `Step` for one method when called with a runner; there is one for each method name.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct StepOf {
    kind: Arc<Kind>,
    /// Attributes that lead from the argument to the runner or to a callable that returns it; empty
    /// if the argument is the runner.
    runner: Vec<Py<PyString>>,
    /// Called with handle and name if a step needs more than the native part; None: never.
    otherwise: Option<Py<PyAny>>,
    /// Whether `otherwise` is called with one rank, too.
    always_otherwise: bool,
    /// Whether the method computes with other ranks, so that it may be a step of a turn in force.
    in_turns: bool,
}

static ATTRIBUTE: &str = "_sglang_distguard_handle";

/// The handle of a runner that was built under the guard.
pub fn handle_of<'py>(runner: &Bound<'py, PyAny>) -> PyResult<Option<Bound<'py, RunnerHandle>>> {
    let py = runner.py();
    // SAFETY: attached; both are alive; a new reference or null with an exception comes back.
    let found = unsafe {
        // Not getattr: that would call a `__getattr__` of SGLang for an attribute that is missing.
        let name = intern!(py, ATTRIBUTE).as_ptr();
        let found = ffi::PyObject_GenericGetAttr(runner.as_ptr(), name);
        Bound::from_owned_ptr_or_err(py, found)
    };
    match found {
        Ok(found) => Ok(found.cast_into::<RunnerHandle>().ok()),
        Err(error) if error.is_instance_of::<PyAttributeError>(py) => Ok(None),
        Err(error) => Err(error),
    }
}

#[pymethods]
impl StepOf {
    #[new]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // named in Python
    #[pyo3(signature = (name, phase, *, exclusive=false, counts=true, runner=None, otherwise=None, always_otherwise=false, in_turns=false))]
    fn new(
        name: &str,
        phase: Option<&str>,
        exclusive: bool,
        counts: bool,
        runner: Option<&Bound<'_, PyString>>,
        otherwise: Option<Py<PyAny>>,
        always_otherwise: bool,
        in_turns: bool,
    ) -> PyResult<Self> {
        let phase = phase.map(str::parse).transpose();
        let mut path = Vec::new();
        if let Some(runner) = runner {
            let names = runner.to_str()?.split('.');
            path.extend(names.map(|it| PyString::intern(runner.py(), it).unbind()));
        }
        Ok(Self {
            kind: Arc::new(Kind {
                name: name.into(),
                phase: phase.map_err(PyValueError::new_err)?,
                exclusive,
                counts,
            }),
            runner: path,
            otherwise,
            always_otherwise,
            in_turns,
        })
    }

    #[pyo3(signature = (owner, /))]
    fn __call__(&self, py: Python<'_>, owner: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let mut runner = owner.clone();
        for name in &self.runner {
            runner = runner.getattr(name)?;
        }
        let handle = match handle_of(&runner)? {
            None if !self.runner.is_empty() && runner.is_callable() => handle_of(&runner.call0()?)?,
            found => found,
        };
        let Some(handle) = handle else {
            return through(py);
        };
        let now = execution::current(py)?;
        if let Some(now) = &now {
            let now = now.get();
            if now.runner.as_ref().is_some_and(|it| it.is(&handle)) {
                let step = now.step.upgrade();
                let covered = step.is_some_and(|it| {
                    let same = it.thread == convert::this_thread();
                    it.covers(&self.kind, handle.get().id())
                        && same
                        && (it.occupies.is_some() || !self.kind.exclusive)
                });
                if covered {
                    // An event loop is in one step for ever, and must stop at the exit.
                    exit::stop_if_exiting(py, is_inside());
                    return through(py);
                }
            }
        }
        if let Some(otherwise) = &self.otherwise {
            if self.always_otherwise || handle.get().has_ranks() {
                let turn = now.as_ref().and_then(|it| it.get().turn.as_ref());
                if let Some(turn) = turn.filter(|_| self.in_turns && handle.get().takes_turns()) {
                    let step = self.step(&handle);
                    let made = StepInTurn::find(py, &handle, turn.bind(py), step, otherwise)?;
                    if let Some(made) = made {
                        return Ok(Py::new(py, made)?.into_any());
                    }
                }
                return otherwise.call1(py, (handle, &*self.kind.name));
            }
        }
        Ok(Py::new(py, self.step(&handle))?.into_any())
    }

    /// Makes a with block that only keeps the end of a manager waiting.
    #[pyo3(signature = (owner, /))]
    fn holding(&self, py: Python<'_>, owner: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let handle = handle_of(owner)?.filter(|it| it.get().is_managers());
        let Some(handle) = handle else {
            return through(py);
        };
        let step = self.kind.name.clone();
        let held = Holding::new(handle.unbind(), step, self.kind.counts);
        Ok(Py::new(py, held)?.into_any())
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let otherwise = self.otherwise.as_ref();
        otherwise.map_or(Ok(()), |it| visit.call(it))
    }
}

impl StepOf {
    fn step(&self, handle: &Bound<'_, RunnerHandle>) -> Step {
        Step {
            kind: self.kind.clone(),
            handle: handle.clone().unbind(),
            held: Mutex::default(),
        }
    }
}

/// A step of `handle`'s runner, to be entered with `with`.
#[pyfunction]
#[pyo3(signature = (handle, name, phase, *, exclusive=false))]
pub fn step(
    handle: &Bound<'_, RunnerHandle>,
    name: &str,
    phase: Option<&str>,
    exclusive: bool,
) -> PyResult<Step> {
    Ok(StepOf::new(name, phase, exclusive, true, None, None, false, false)?.step(handle))
}
