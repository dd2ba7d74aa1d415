//! Publishing and resuming in a scope: the with blocks in which a claim on a scope is held.
//! `distguard_core::scopes` decides which scope a publish gets.

use std::sync::{Arc, Mutex};

use distguard_core::scopes::{ClaimId, Publish, ScopeId, DEFAULT};
use pyo3::intern;
use pyo3::prelude::*;

use crate::claim::Claim;
use crate::collecting::CollectingOff;
use crate::execution::{self, Entered, Entry, Execution};
use crate::process;
use crate::scope::{id_of, made, Counted, Scope};
use crate::scoped_global;
use crate::sync::lock;

/// One publish: chooses its scope when it is entered, and undoes the choice unless it succeeded.
///
/// Entering it puts the running code into the scope, with its claim. `succeed` keeps it there.
#[pyclass(frozen, module = "sglang_distguard._core")]
pub struct Publishing {
    label: String,
    /// Returns whether the current scope has a configuration, and another one.
    is_other: Py<PyAny>,
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

/// Where a publish happens, and what has moved out of its way.
struct Decision<'py> {
    /// Of this publish, in the current scope or the fresh one.
    claim: Arc<Claim>,
    /// None: it stays in the current scope.
    fresh: Option<Bound<'py, Scope>>,
    aside: Option<Bound<'py, Scope>>,
}

impl Publishing {
    /// Decides, and puts the pending configuration aside if necessary, while no other code runs: other
    /// threads find each configuration where the ledger has it.
    fn decide<'py>(
        &self,
        py: Python<'py>,
        current: ScopeId,
        before: Option<ClaimId>,
    ) -> PyResult<Decision<'py>> {
        // What runs Python comes first, and once more if other code has published meanwhile.
        let counted = Counted::new(py)?;
        let may_move = self.may_put_aside && current == DEFAULT;
        let mut initial = Vec::new();
        let (publish, _no_finalizer_runs) = loop {
            let stamp = process::scopes().with(|ledger| ledger.stamp());
            let is_other = self.is_other.bind(py).call0()?.is_truthy()?;
            if is_other && may_move && initial.is_empty() {
                initial = scoped_global::initial_values(py)?;
                continue;
            }
            let no_finalizer_runs = CollectingOff::new(py);
            let publish = process::scopes().with(|ledger| {
                (ledger.stamp() == stamp)
                    .then(|| ledger.publish(current, before, is_other, may_move))
            });
            if let Some(publish) = publish {
                break (publish, no_finalizer_runs);
            }
        };
        let scope = match publish {
            Publish::New(_, scope) => scope,
            Publish::Replace(_) | Publish::Aside(..) => current,
        };
        let claim = Claim::new(publish.claim(), scope);
        let (fresh, aside) = match publish {
            Publish::Replace(_) => (None, None),
            Publish::New(_, scope) => (Some(made(py, scope, self.label.clone(), counted)?), None),
            Publish::Aside(_, to) => {
                let aside = made(py, to, "pending".to_owned(), counted)?;
                if let Err(error) = scoped_global::move_aside(py, &aside, &initial) {
                    take_back(py, &aside, claim.id, before)?;
                    return Err(error);
                }
                (None, Some(aside))
            }
        };
        Ok(Decision {
            claim,
            fresh,
            aside,
        })
    }
}

/// Undoes what `decide` has put aside, unless a build has gone on there meanwhile. The ledger forgets
/// a scope that is gone, so `aside` lives.
fn take_back(
    py: Python<'_>,
    aside: &Bound<'_, Scope>,
    claim: ClaimId,
    before: Option<ClaimId>,
) -> PyResult<()> {
    let _no_finalizer_runs = CollectingOff::new(py);
    let scope = aside.get().scope_id();
    if process::scopes().with(|ledger| ledger.take_back(claim, scope, before)) {
        scoped_global::move_back(py, aside)?;
    }
    Ok(())
}

/// Undoes a publish, in the scope of `claim`.
fn undo(
    py: Python<'_>,
    aside: Option<&Bound<'_, Scope>>,
    scope: ScopeId,
    claim: ClaimId,
    before: Option<ClaimId>,
) -> PyResult<()> {
    if let Some(aside) = aside {
        return take_back(py, aside, claim, before);
    }
    process::scopes().with(|ledger| ledger.undo(scope, claim, before));
    Ok(())
}

/// Lets a scope that was put aside live as long as the `ServerArgs` published there, to which its
/// own context refers.
fn keep_pending(py: Python<'_>, aside: &Bound<'_, Scope>) -> PyResult<()> {
    py.import(intern!(py, "sglang_distguard.context.scopes"))?
        .call_method1(intern!(py, "keep_pending"), (aside,))
        .map(drop)
}

impl Publishing {
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        let Some(chosen) = lock(&self.chosen).take() else {
            return Ok(());
        };
        let aside = chosen.aside.as_ref().map(|it| it.bind(py));
        let undone = undo(py, aside, chosen.scope, chosen.claim, chosen.before);
        chosen.entry.leave(py).and(undone)
    }
}

#[pymethods]
impl Publishing {
    #[new]
    #[pyo3(signature = (label, *, is_other, may_put_aside))]
    fn new(label: String, is_other: Py<PyAny>, may_put_aside: bool) -> Self {
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
        let Decision {
            claim,
            fresh,
            aside,
        } = slf.get().decide(py, current, before)?;
        let is_fresh = fresh.is_some();
        let entered = aside
            .as_ref()
            .map_or(Ok(()), |aside| keep_pending(py, aside))
            .and_then(|()| {
                execution::derived(py, |it| {
                    if let Some(scope) = fresh {
                        *it = Execution {
                            default_dtype: it.default_dtype.take(),
                            turn: it.turn.take(),
                            owns_environment: it.owns_environment,
                            ..Execution::default()
                        };
                        it.scope = Some(scope.unbind());
                    }
                    it.claim = Some(Arc::clone(&claim));
                })
            })
            .and_then(|wanted| Entry::new(py, Some(&wanted)));
        let entry = match entered {
            Ok(entry) => entry,
            Err(error) => {
                undo(py, aside.as_ref(), claim.scope, claim.id, before)?;
                return Err(error);
            }
        };
        *lock(&slf.get().chosen) = Some(Chosen {
            scope: claim.scope,
            claim: claim.id,
            before,
            entry,
            is_fresh,
            aside: aside.map(Bound::unbind),
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
