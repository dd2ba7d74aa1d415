//! Scopes: whose view of SGLang's process-globals the running code has (`execution` says which).
//! Holds values, never decides: who gets a new scope is `distguard_core::scopes`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use distguard_core::key::Key;
use distguard_core::scopes::{ClaimId, Publish, ScopeId, ScopeLedger, DEFAULT};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyWeakrefMethods, PyWeakrefReference};
use pyo3::{intern, PyTraverseError, PyVisit};

use crate::claim::Claim;
use crate::convert;
use crate::execution::{self, Entered, Entry, Execution};
use crate::process;
use crate::scoped_global;
use crate::sync::lock;

/// What a scope has of one global.
#[derive(Default)]
pub enum Held {
    /// Not yet read or written in this scope: its value is the initial one.
    #[default]
    Unset,
    Value(Py<PyAny>),
    /// It was deleted in this scope, and has not been written since.
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

    pub fn read(&self, py: Python<'_>, slot: usize) -> Held {
        let values = lock(&self.values);
        values
            .get(slot)
            .map_or(Held::Unset, |held| held.clone_ref(py))
    }

    /// Stores `held`; returns what was there.
    pub fn write(&self, slot: usize, held: Held) -> Held {
        let mut values = lock(&self.values);
        if values.len() <= slot {
            values.resize_with(slot + 1, Held::default);
        }
        std::mem::replace(&mut values[slot], held)
    }

    /// Stores `value` unless another thread wrote or deleted first; returns what the slot holds then.
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
        drop(values); // `value` is dropped after it
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

/// The scope of the running code; `None` is SGLang's default one.
pub fn current(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    // A scope in an execution is alive, and the thread that has it has seen it made.
    if ALIVE.load(Ordering::Relaxed) == 0 {
        return Ok(None);
    }
    let execution = execution::current(py)?;
    Ok(execution.and_then(|it| it.get().scope.as_ref().map(|scope| scope.clone_ref(py))))
}

/// Where the running code finds what it has of one global.
pub enum Where {
    /// SGLang's default scope, which is not a `Scope`.
    Default,
    Scope(Held),
    /// Asking failed; it will fail again where it can be raised.
    Unknown,
}

/// What the running code's scope has in `slot`. Runs no Python.
pub fn current_value(py: Python<'_>, slot: usize) -> Where {
    if ALIVE.load(Ordering::Relaxed) == 0 {
        return Where::Default;
    }
    match execution::current(py) {
        Err(_) => Where::Unknown,
        Ok(now) => match now.as_ref().and_then(|it| it.get().scope.as_ref()) {
            None => Where::Default,
            Some(scope) => Where::Scope(scope.get().read(py, slot)),
        },
    }
}

/// The scope of the running code; None is SGLang's default one.
#[pyfunction]
pub fn current_scope(py: Python<'_>) -> PyResult<Option<Py<Scope>>> {
    current(py)
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

fn id_of(scope: Option<&Bound<'_, Scope>>) -> ScopeId {
    scope.map_or(DEFAULT, |scope| scope.get().id)
}

/// One publish: chooses its scope when it is entered, and gives it back unless it succeeded.
///
/// Entered, the running code is in the scope and holds its claim. `succeed` lets it stay so.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Publishing {
    label: String,
    is_other: bool,
    may_put_aside: bool,
    chosen: Mutex<Option<Chosen>>,
}

struct Chosen {
    scope: ScopeId,
    claim: ClaimId,
    before: Option<ClaimId>,
    entry: Entry,
    is_fresh: bool,
    /// Where what was here before has been moved.
    aside: Option<Py<Scope>>,
    has_succeeded: bool,
}

/// Moves what the default scope holds to the scope `aside`.
///
/// It lives as long as the `ServerArgs` published there, which its own context refers to.
fn put_aside(py: Python<'_>, aside: ScopeId) -> PyResult<Py<Scope>> {
    let kept = register(py, aside, "pending".to_owned())?;
    let fresh = new_scope(py, "fresh".to_owned())?;
    let inside = execution::derived(py, |it| it.scope = Some(fresh.clone().unbind()))?;
    let entry = Entry::new(py, Some(&inside))?;
    let moved = scoped_global::move_aside(py, &kept, &fresh);
    entry.leave(py)?;
    moved?;
    py.import(intern!(py, "sglang_distguard.scoping"))?
        .call_method1(intern!(py, "keep_pending"), (&kept,))?;
    Ok(kept.unbind())
}

impl Publishing {
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        let Some(chosen) = lock(&self.chosen).take() else {
            return Ok(());
        };
        let (claim, before) = (chosen.claim, chosen.before);
        if let Some(aside) = &chosen.aside {
            let aside = aside.bind(py);
            scoped_global::move_back(py, aside)?;
            process::scopes().with(|ledger| ledger.take_back(claim, aside.get().id, before));
        } else {
            process::scopes().with(|ledger| ledger.abandon(chosen.scope, claim, before));
        }
        chosen.entry.leave(py)
    }
}

#[pymethods]
impl Publishing {
    #[new]
    #[pyo3(signature = (label, *, is_other, may_put_aside))]
    fn new(label: String, is_other: bool, may_put_aside: bool) -> Self {
        Self {
            label,
            is_other,
            may_put_aside,
            chosen: Mutex::default(),
        }
    }

    /// Whether the scope is one that this publish made.
    #[getter]
    fn is_fresh(&self) -> bool {
        lock(&self.chosen).as_ref().is_some_and(|it| it.is_fresh)
    }

    fn __enter__(slf: Py<Self>, py: Python<'_>) -> PyResult<Py<Self>> {
        let execution = execution::current(py)?;
        let now = execution.as_ref().map(pyo3::Bound::get);
        let current = now.map_or(DEFAULT, Execution::scope_id);
        let mine = now.and_then(|it| it.claim.clone());
        let before = mine.as_ref().map(|it| it.id);
        let (other, movable) = (slf.get().is_other, slf.get().may_put_aside);
        let publish =
            process::scopes().with(|ledger| ledger.publish(current, before, other, movable));
        let mut aside = None;
        let (id, claim, fresh) = match publish {
            Publish::Replace(claim) => (current, claim, None),
            Publish::Aside(claim, to) => {
                match put_aside(py, to) {
                    Ok(kept) => aside = Some(kept),
                    Err(error) => {
                        process::scopes().with(|ledger| ledger.take_back(claim, to, before));
                        return Err(error);
                    }
                }
                (current, claim, None)
            }
            Publish::New(claim, scope) => {
                let label = slf.get().label.clone();
                (scope, claim, Some(register(py, scope, label)?))
            }
        };
        let held = Claim::new(claim, id);
        let is_fresh = fresh.is_some();
        let wanted = execution::derived(py, |it| {
            if let Some(scope) = fresh {
                *it = Execution {
                    default_dtype: it.default_dtype.take(),
                    turn: it.turn.take(),
                    owns_environment: it.owns_environment,
                    ..Execution::default()
                };
                it.scope = Some(scope.unbind());
            }
            it.claim = Some(held);
        })?;
        let entry = Entry::new(py, Some(&wanted))?;
        *lock(&slf.get().chosen) = Some(Chosen {
            scope: id,
            claim,
            before,
            entry,
            is_fresh,
            aside,
            has_succeeded: false,
        });
        Ok(slf)
    }

    /// What was published stays, if the with block ends without an error.
    fn succeed(&self) {
        if let Some(chosen) = lock(&self.chosen).as_mut() {
            chosen.has_succeeded = true;
        }
    }

    #[pyo3(signature = (error, *_more))]
    fn __exit__(
        &self,
        py: Python<'_>,
        error: &Bound<'_, PyAny>,
        _more: &Bound<'_, pyo3::types::PyTuple>,
    ) -> PyResult<()> {
        let mut chosen = lock(&self.chosen);
        if error.is_none() && chosen.as_ref().is_some_and(|it| it.has_succeeded) {
            // The running code stays in the scope, and holds the claim.
            let stays = chosen.take();
            drop(chosen);
            drop(stays);
            return Ok(());
        }
        drop(chosen);
        self.end(py)
    }
}

impl Drop for Publishing {
    fn drop(&mut self) {
        if lock(&self.chosen).is_some() {
            Python::attach(|py| drop(self.end(py)));
        }
    }
}

/// `scope` and the claim of what was published there and not built, for a with block.
///
/// Not a claim of its own: what others hold is shared, what nobody holds is claimed for the block.
#[pyfunction]
#[pyo3(signature = (scope, /))]
pub fn resuming(py: Python<'_>, scope: Option<Py<Scope>>) -> PyResult<Entered> {
    let id = id_of(scope.as_ref().map(|it| it.bind(py)));
    let claim = process::scopes().with(|ledger| ledger.resume(id));
    let execution = execution::derived(py, |it| {
        let claim = claim.map(|claim| Claim::share(claim, id));
        *it = Execution {
            scope,
            claim,
            default_dtype: it.default_dtype.take(),
            turn: it.turn.take(),
            owns_environment: it.owns_environment,
            ..Execution::default()
        };
    })?;
    Ok(execution::run_as(Some(execution.unbind())))
}

/// A with block in which `scope`, where nobody builds or runs, is the calling code's to tidy up.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Vacancy {
    scope: ScopeId,
    claim: Mutex<Option<ClaimId>>,
}

#[pymethods]
impl Vacancy {
    #[new]
    #[pyo3(signature = (scope, /))]
    #[allow(clippy::needless_pass_by_value)]
    fn new(scope: Option<Bound<'_, Scope>>) -> Self {
        Self {
            scope: id_of(scope.as_ref()),
            claim: Mutex::default(),
        }
    }

    /// Whether it is vacant, and so claimed.
    fn __enter__(&self) -> bool {
        let claim = process::scopes().with(|ledger| ledger.claim_vacant(self.scope));
        *lock(&self.claim) = claim;
        claim.is_some()
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, pyo3::types::PyTuple>) {
        self.end();
    }
}

impl Vacancy {
    fn end(&self) {
        if let Some(claim) = lock(&self.claim).take() {
            process::scopes().with(|ledger| ledger.abandon(self.scope, claim, None));
        }
    }
}

impl Drop for Vacancy {
    fn drop(&mut self) {
        self.end();
    }
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
#[allow(clippy::needless_pass_by_value)]
pub fn live_runners(scope: Option<Bound<'_, Scope>>) -> usize {
    let id = id_of(scope.as_ref());
    process::scopes().with(|ledger| ledger.live(id))
}
