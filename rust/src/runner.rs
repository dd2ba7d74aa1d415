//! The scope and the leases that one runner holds until it is closed or collected. A manager
//! (SGLang's Scheduler, `TokenizerManager` or `DetokenizerManager`) has such a handle without leases.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use distguard_core::actor::Actor;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::occupancy::Occupancy;
use distguard_core::phases::{Access, Phase, RunnerId, Visit};
use distguard_core::scopes::{Resident, ScopeId, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use crate::attached::Attached;
use crate::convert;
use crate::device::OnDevice;
use crate::errors::{make, to_python};
use crate::exit::wait_detached;
use crate::leasing::{lease, release};
use crate::process::{budgets, calls, communicators, forks, registry, scopes};
use crate::scope::Scope;
use crate::sync::lock;

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// A number that is no epoch of a registry.
const NEVER: u64 = u64::MAX;

/// Ties a runner, or a manager, to a scope and to the shared state it uses.
#[pyclass(frozen, weakref, module = "sglang_distguard._core")]
pub struct RunnerHandle {
    name: Arc<str>,
    /// The name of a manager's class; None for a runner.
    manager: Option<String>,
    /// None is SGLang's default scope.
    scope: Option<Py<Scope>>,
    scope_id: ScopeId,
    leases: Mutex<Vec<(Key, LeaseId)>>,
    /// The registry's epoch at which the leases were good.
    good_at: AtomicU64,
    id: RunnerId,
    /// The runner whose weights it uses, if it is a draft.
    target: Option<RunnerId>,
    /// The name under which it takes turns with other runners on all ranks; None if it need not.
    turns: Option<String>,
    /// Whether it computes together with other ranks.
    ranks: bool,
    closed: AtomicBool,
    /// The CUDA device that its code computes on; negative: whichever is current.
    device: AtomicI32,
    /// Whether the end of a manager has begun.
    ended: AtomicBool,
    /// `Calls::left` when `end_if_vacant` looked last.
    left: AtomicU64,
    /// What a manager has outside of its scope: each is called, once, when it ends.
    parts: Attached<Vec<Py<PyAny>>>,
    /// The runners that a manager has built.
    runners: Attached<Vec<Py<RunnerHandle>>>,
    /// The CUDA stream of its own (`runner/streams.py`), if it has one.
    stream: Attached<Option<Py<PyAny>>>,
    /// The thread whose forward writes its attention metadata and static buffers.
    forward: Arc<Mutex<Occupancy>>,
    /// The process that built it: `pid` for messages, `forks` (see `process::forks`) for checks.
    pid: u32,
    forks: u32,
}

impl RunnerHandle {
    pub fn id(&self) -> RunnerId {
        self.id
    }

    pub fn target(&self) -> Option<RunnerId> {
        self.target
    }

    pub fn name_ref(&self) -> Arc<str> {
        self.name.clone()
    }

    pub fn scope_ref(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|scope| scope.clone_ref(py))
    }

    /// Whether it is a manager's, whose methods are `distguard_core::calls` and in no phase.
    pub fn is_managers(&self) -> bool {
        self.manager.is_some()
    }

    fn noun(&self) -> &str {
        self.manager.as_deref().unwrap_or("runner")
    }

    /// Makes the runner's device current, if it has one; the caller restores the former one.
    pub fn on_device(&self, py: Python<'_>) -> PyResult<Option<OnDevice>> {
        let index = self.device.load(Ordering::Relaxed);
        (index >= 0).then(|| OnDevice::enter(py, index)).transpose()
    }

    pub fn has_device(&self) -> bool {
        self.device.load(Ordering::Relaxed) >= 0
    }

    /// Whether it was built by this process, and not by one that has forked this one.
    pub fn is_of_this_process(&self) -> bool {
        self.forks == forks()
    }

    pub fn has_ranks(&self) -> bool {
        self.ranks
    }

    pub fn takes_turns(&self) -> bool {
        self.turns.is_some()
    }

    pub fn access(&self, phase: Phase) -> Access {
        Access {
            phase,
            runner: Some(self.id),
            target: self.target,
        }
    }

    /// Claims the runner for a forward of `actor`'s thread; the caller leaves the place.
    pub fn occupy_for_forward(
        &self,
        py: Python<'_>,
        actor: &Actor,
    ) -> PyResult<Arc<Mutex<Occupancy>>> {
        let entered = lock(&self.forward).enter(actor);
        self.or_in_use(py, entered, |name, other| {
            format!(
                "runner '{name}' is in a forward of thread {}: its attention metadata and static \
                 buffers hold one batch at a time. Call its forward from one thread at a time, or \
                 build one runner per thread",
                other.thread_name
            )
        })?;
        Ok(self.forward.clone())
    }

    /// The error for a call that finds it closed.
    pub fn closed_error(&self, py: Python<'_>) -> PyErr {
        let message = format!("{} '{}' is closed; build a new one", self.noun(), self.name);
        let made = self.error(py, "DistGuardError", &message);
        made.unwrap_or_else(|failed| failed)
    }

    fn error(&self, py: Python<'_>, class: &str, message: &str) -> PyResult<PyErr> {
        let details = PyDict::new(py);
        details.set_item("runner", &*self.name)?;
        make(py, class, message, &details)
    }

    fn leases(&self) -> MutexGuard<'_, Vec<(Key, LeaseId)>> {
        lock(&self.leases)
    }

    /// Raises with the text from `message` if another thread is in a place.
    fn or_in_use(
        &self,
        py: Python<'_>,
        entered: Result<usize, Actor>,
        message: impl FnOnce(&str, &Actor) -> String,
    ) -> PyResult<usize> {
        let other = match entered {
            Ok(depth) => return Ok(depth),
            Err(other) => other,
        };
        let details = PyDict::new(py);
        details.set_item("runner", &*self.name)?;
        details.set_item("holders", [other.to_string()])?;
        Err(make(
            py,
            "StateInUse",
            &message(&self.name, &other),
            &details,
        )?)
    }

    fn release_leases(&self) {
        let leases = std::mem::take(&mut *self.leases());
        for (key, lease) in leases {
            release(&key, lease);
        }
    }

    /// Runs no Python, because the destructor calls it.
    fn release(&self) -> bool {
        if self.closed.swap(true, Ordering::AcqRel) {
            return false;
        }
        // A forked child's registry is not the one that gave the leases.
        if self.is_of_this_process() {
            self.release_leases();
            if self.is_managers() {
                calls().end(self.id);
            }
            scopes().with(|ledger| ledger.unbind(self.scope_id, self.id));
        }
        true
    }
}

#[pymethods]
impl RunnerHandle {
    #[new]
    #[pyo3(signature = (name, scope, keys, *, turns=None, ranks=false, manager=None))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(
        py: Python<'_>,
        name: String,
        scope: Option<Bound<'_, Scope>>,
        keys: Vec<String>,
        turns: Option<String>,
        ranks: bool,
        manager: Option<String>,
    ) -> PyResult<Self> {
        let keys: Vec<_> = keys
            .iter()
            .map(|key| convert::key(key))
            .collect::<PyResult<_>>()?;
        let scope_id = scope
            .as_ref()
            .map_or(DEFAULT, |scope| scope.get().scope_id());
        let leases = lease(py, scope_id, keys, &name)?;
        let id = RunnerId(NUMBERS.fetch_add(1, Ordering::Relaxed));
        let kind = if manager.is_some() {
            Resident::Manager
        } else {
            Resident::Runner
        };
        let target = scopes().with(|ledger| ledger.bind(scope_id, id, kind));
        Ok(Self {
            name: name.into(),
            manager,
            scope: scope.map(Bound::unbind),
            scope_id,
            leases: Mutex::new(leases),
            good_at: AtomicU64::new(NEVER),
            id,
            target,
            turns,
            ranks,
            closed: AtomicBool::new(false),
            device: AtomicI32::new(-1),
            ended: AtomicBool::new(false),
            left: AtomicU64::default(),
            parts: Attached::default(),
            runners: Attached::default(),
            stream: Attached::default(),
            forward: Arc::default(),
            pid: std::process::id(),
            forks: forks(),
        })
    }

    #[getter]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[getter]
    fn manager(&self) -> Option<&str> {
        self.manager.as_deref()
    }

    #[getter]
    fn turns(&self) -> Option<&str> {
        self.turns.as_deref()
    }

    #[getter]
    fn scope(&self, py: Python<'_>) -> Option<Py<Scope>> {
        self.scope.as_ref().map(|scope| scope.clone_ref(py))
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Has its code compute on this CUDA device, from whichever thread.
    fn use_device(&self, index: i32) {
        self.device.store(index, Ordering::Relaxed);
    }

    /// Holds one more lease, on `key`.
    fn hold(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        let key = convert::key(key)?;
        self.check(py)?;
        let taken = lease(py, self.scope_id, vec![key], &self.name)?;
        self.leases().extend(taken);
        self.good_at.store(NEVER, Ordering::Release);
        if self.closed() {
            // Closed by another thread, which may have released the leases before these were added.
            self.release_leases();
        }
        Ok(())
    }

    /// Releases its leases on `key` alone; false if it has none.
    fn release_key(&self, key: &str) -> PyResult<bool> {
        let key = convert::key(key)?;
        let mut leases = self.leases();
        let before = leases.len();
        leases.retain(|(held, lease)| {
            let goes = *held == key;
            if goes {
                release(&key, *lease);
            }
            !goes
        });
        Ok(leases.len() < before)
    }

    /// Raises if the runner was closed, belongs to another process, or has a broken lease.
    pub fn check(&self, py: Python<'_>) -> PyResult<()> {
        // Read first: a change during the check of the leases is noticed by the next check.
        let epoch = registry().slots_epoch();
        let mine = self.is_of_this_process() && !self.closed();
        if mine && self.good_at.load(Ordering::Acquire) == epoch {
            return Ok(());
        }
        if self.is_of_this_process() && self.closed() {
            return Err(self.closed_error(py));
        }
        if self.is_of_this_process() {
            let good = registry().check_leases(&self.leases());
            good.map_err(|error| to_python(py, &error))?;
            self.good_at.store(epoch, Ordering::Release);
            return Ok(());
        }
        let (pid, here) = (self.pid, std::process::id());
        let (noun, name) = (self.noun(), &self.name);
        let message = format!(
            "{noun} '{name}' was built in process {pid}; this forked child ({here}) cannot use it. \
             Build one here, or start the process with spawn"
        );
        Err(self.error(py, "ForkedError", &message)?)
    }

    /// (thread, step) of other threads in steps of the runner or of its drafts. Of a manager: of
    /// every call in its methods, for which its end waits.
    fn inside(&self) -> Vec<(String, Option<String>)> {
        if self.is_managers() {
            let calls = calls().inside(self.id).into_iter();
            return calls
                .map(|it| (it.actor.thread_name.to_string(), Some(it.step.to_string())))
                .collect();
        }
        let visits = registry().inside_of(self.id, convert::this_thread());
        let named = |visit: Visit| {
            let step = visit.step.map(|step| step.to_string());
            (visit.actor.thread_name.to_string(), step)
        };
        visits.into_iter().map(named).collect()
    }

    /// The method of a manager that the calling thread is in, if any.
    fn inside_here(&self) -> Option<String> {
        let here = convert::this_thread();
        let mut calls = calls().inside(self.id).into_iter();
        let mine = calls.find(|it| it.actor.thread == here);
        mine.map(|it| it.step.to_string())
    }

    /// Notes that this manager has built the runner of `handle`.
    fn keep_runner(&self, py: Python<'_>, handle: Py<RunnerHandle>) {
        self.runners.with(py, |runners| runners.push(handle));
    }

    /// What was kept with `keep_runner`, oldest first.
    #[getter]
    fn runners(&self, py: Python<'_>) -> Vec<Py<RunnerHandle>> {
        let copied = |it: &Py<RunnerHandle>| it.clone_ref(py);
        self.runners
            .with(py, |runners| runners.iter().map(copied).collect())
    }

    /// The CUDA stream of its own, if it has one.
    #[getter]
    pub fn stream(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.stream
            .with(py, |stream| stream.as_ref().map(|it| it.clone_ref(py)))
    }

    /// Each step in a phase calls `begin` of it, and `end` with what that returned.
    #[setter]
    fn set_stream(&self, py: Python<'_>, stream: Option<Py<PyAny>>) {
        let before = self.stream.with(py, |it| std::mem::replace(it, stream));
        drop(before); // may run Python
    }

    /// Has `end` called when the manager ends.
    fn keep_part(&self, py: Python<'_>, end: Py<PyAny>) {
        self.parts.with(py, |parts| parts.push(end));
    }

    /// What was kept with `keep_part`, once, oldest first.
    fn take_parts(&self, py: Python<'_>) -> Vec<Py<PyAny>> {
        self.parts.with(py, std::mem::take)
    }

    /// Refuses a manager's methods from now on; false if `end` was called before.
    fn end(&self) -> bool {
        calls().end(self.id);
        !self.ended.swap(true, Ordering::AcqRel)
    }

    /// Refuses a manager's methods from now on if no call is inside. Returns whether it does.
    fn end_if_vacant(&self) -> bool {
        self.left.store(calls().left(), Ordering::Release);
        calls().end_if_vacant(self.id)
    }

    /// Sleeps, detached, until a call has left since `end_if_vacant`; at most for `seconds`.
    fn wait_for_calls(&self, py: Python<'_>, seconds: f64) {
        let slice = convert::seconds(seconds);
        let left = self.left.load(Ordering::Acquire);
        wait_detached(py, || calls().wait(left, slice));
    }

    /// Claims the communicators of the runner's scope; `end_collectives` ends the claim. False if
    /// the calling thread has claimed them already.
    pub fn begin_collectives(&self, py: Python<'_>) -> PyResult<bool> {
        let me = convert::this_actor(py, Some(self.name_ref()))?;
        let entered = communicators().entry(self.scope_id).or_default().enter(&me);
        let depth = self.or_in_use(py, entered, |name, other| {
            format!(
                "runner '{name}' uses communicators over which {other} is computing now, and the \
                 collectives of two threads would be mixed up. A runner shares its communicators \
                 with its drafts, and a block of turn its turn with all runners in it: let one \
                 thread at a time call their steps, and end a block after them"
            )
        })?;
        Ok(depth == 1)
    }

    pub fn end_collectives(&self) {
        let mut places = communicators();
        if places.get_mut(&self.scope_id).is_some_and(Occupancy::leave) {
            places.remove(&self.scope_id);
        }
    }

    /// Releases the leases and, if this was the scope's last runner, the scope's values.
    fn close(&self, py: Python<'_>) -> bool {
        let first = self.release();
        if let Some(scope) = self.scope.as_ref().filter(|_| first) {
            if scopes().with(|ledger| ledger.live(self.scope_id)) == 0 {
                scope.bind(py).get().clear(py);
            }
        }
        first
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { "closed" } else { "open" };
        format!("<RunnerHandle {:?} {state}>", self.name)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let each = |parts: &Vec<Py<PyAny>>| parts.iter().try_for_each(|it| visit.call(it));
        // SAFETY: the interpreter calls this, so the thread is attached.
        unsafe { self.parts.peek(each) }.unwrap_or(Ok(()))?;
        let all = |them: &Vec<Py<RunnerHandle>>| them.iter().try_for_each(|it| visit.call(it));
        // SAFETY: as above.
        unsafe { self.runners.peek(all) }.unwrap_or(Ok(()))?;
        let one = |it: &Option<Py<PyAny>>| it.as_ref().map_or(Ok(()), |it| visit.call(it));
        // SAFETY: as above.
        unsafe { self.stream.peek(one) }.unwrap_or(Ok(()))?;
        self.scope
            .as_ref()
            .map_or(Ok(()), |scope| visit.call(scope))
    }

    fn __clear__(&self, py: Python<'_>) {
        drop(self.take_parts(py));
        self.set_stream(py, None);
    }
}

impl Drop for RunnerHandle {
    fn drop(&mut self) {
        self.release();
        if self.is_of_this_process() {
            budgets().close(self.id);
            if self.is_managers() {
                calls().forget(self.id);
            }
        }
    }
}
