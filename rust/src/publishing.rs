//! Publishing and resuming in a scope: the with blocks in which a claim on a scope is held.
//! `distguard_core::scopes` decides which scope a publish gets.

use std::sync::Mutex;

use distguard_core::scopes::{ClaimId, Publish, ScopeId, DEFAULT};
use pyo3::intern;
use pyo3::prelude::*;

use crate::claim::Claim;
use crate::execution::{self, Entered, Entry, Execution};
use crate::process;
use crate::scope::{id_of, new_scope, register, Scope};
use crate::scoped_global;
use crate::sync::lock;

/// One publish: chooses its scope when it is entered, and undoes the choice unless it succeeded.
///
/// Entering it puts the running code into the scope, with its claim. `succeed` keeps it there.
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
    /// The scope to which the former values were moved.
    aside: Option<Py<Scope>>,
    has_succeeded: bool,
}

/// Moves the values of the default scope to the scope `aside`.
///
/// That scope lives as long as the `ServerArgs` published there, to which its own context refers.
fn put_aside(py: Python<'_>, aside: ScopeId) -> PyResult<Py<Scope>> {
    let kept = register(py, aside, "pending".to_owned())?;
    let fresh = new_scope(py, "fresh".to_owned())?;
    let inside = execution::derived(py, |it| it.scope = Some(fresh.clone().unbind()))?;
    let entry = Entry::new(py, Some(&inside))?;
    let moved = scoped_global::move_aside(py, &kept, &fresh);
    entry.leave(py)?;
    moved?;
    py.import(intern!(py, "sglang_distguard.context.scopes"))?
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
            process::scopes()
                .with(|ledger| ledger.take_back(claim, aside.get().scope_id(), before));
        } else {
            process::scopes().with(|ledger| ledger.undo(chosen.scope, claim, before));
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

    /// Whether the scope was made for this publish.
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

    /// Keeps what was published if the with block ends without an error.
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

/// Makes `scope` current, with the claim of a publish that is not built yet, for a with block.
///
/// The block shares a claim that other executions hold. If none holds it, the block claims anew.
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

/// A with block that claims `scope` for tidying up, if no runner is built or lives there.
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

    /// Claims the scope; returns whether it was vacant and so is claimed.
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
            process::scopes().with(|ledger| ledger.undo(self.scope, claim, None));
        }
    }
}

impl Drop for Vacancy {
    fn drop(&mut self) {
        self.end();
    }
}
