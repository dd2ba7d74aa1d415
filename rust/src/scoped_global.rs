//! Accessor of one SGLang module global, or class attribute, that has a value in every scope.
//! `value` is the whole hot path: a read in every layer of every forward.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, OnceLock};

use pyo3::exceptions::{PyAttributeError, PyNameError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyType};
use pyo3::{PyTraverseError, PyVisit};

use crate::execution::{self, Entry};
use crate::remembered::Remembered;
use crate::scope::{current, current_value, new_scope, no_scope_exists, Held, Scope};
use crate::sync::lock;
use crate::weak_list::WeakList;

/// The slot in which a scope keeps the value of `module.name`: stable over uninstall and install.
fn slot_of(qualified: String) -> usize {
    static SLOTS: OnceLock<Mutex<HashMap<String, usize>>> = OnceLock::new();
    let mut slots = lock(SLOTS.get_or_init(Mutex::default));
    let next = slots.len();
    *slots.entry(qualified).or_insert(next)
}

/// Where SGLang itself keeps the value, which is that of the default scope.
#[derive(FromPyObject)]
enum Owner {
    /// The globals of a module.
    Globals(Py<PyDict>),
    /// A class, whose namespace can be written only through its attributes.
    Class(Py<PyType>),
}

impl Owner {
    /// Name of the module, followed by the class if the owner is a class.
    fn qualified(&self, py: Python<'_>) -> PyResult<String> {
        match self {
            Self::Globals(globals) => {
                let module = globals.bind(py).get_item("__name__")?;
                Ok(module.map_or_else(String::new, |module| module.to_string()))
            }
            Self::Class(class) => {
                let class = class.bind(py);
                Ok(format!("{}.{}", class.module()?, class.qualname()?))
            }
        }
    }

    fn get<'py>(&self, name: &Bound<'py, PyString>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self {
            Self::Globals(globals) => globals.bind(name.py()).get_item(name),
            Self::Class(class) => class.bind(name.py()).getattr_opt(name),
        }
    }

    fn set(&self, name: &Bound<'_, PyString>, value: Py<PyAny>) -> PyResult<()> {
        match self {
            Self::Globals(globals) => globals.bind(name.py()).set_item(name, value),
            Self::Class(class) => class.bind(name.py()).setattr(name, value),
        }
    }

    fn delete(&self, name: &Bound<'_, PyString>) -> PyResult<()> {
        match self {
            Self::Globals(globals) => {
                let globals = globals.bind(name.py());
                if !globals.contains(name)? {
                    return Err(self.missing(name));
                }
                globals.del_item(name)
            }
            Self::Class(class) => class.bind(name.py()).delattr(name),
        }
    }

    /// Sets the global that changed code of a module asks; code reaches a class by its accessor.
    fn tell(&self, py: Python<'_>, scopes_exist: bool) -> PyResult<()> {
        match self {
            Self::Globals(globals) => {
                let name = intern!(py, "_distguard_scopes_exist");
                globals.bind(py).set_item(name, scopes_exist)
            }
            Self::Class(_) => Ok(()),
        }
    }

    /// The error that Python raises for a name that does not exist.
    fn missing(&self, name: &Bound<'_, PyString>) -> PyErr {
        match self {
            Self::Globals(_) => PyNameError::new_err(format!("name '{name}' is not defined")),
            Self::Class(class) => {
                let class = class.bind(name.py());
                let class = class
                    .name()
                    .map_or_else(|_| String::new(), |it| it.to_string());
                PyAttributeError::new_err(format!(
                    "type object '{class}' has no attribute '{name}'"
                ))
            }
        }
    }
}

/// Accessor of `name` in `owner`: the globals of a module, or a class.
///
/// `.value` is SGLang's own in the default scope and the scope's own value elsewhere. torch.compile
/// traces the attribute and guards on it (measured with torch 2.14.1), so a compiled module is
/// recompiled for another runner's value.
#[pyclass(frozen, weakref, module = "sglang_distguard._core")]
#[repr(C)] // what a read needs comes first, so that it fits into one cache line
pub struct ScopedGlobal {
    owner: Owner,
    slot: usize,
    /// The value of the default scope at the last read.
    remembered: Remembered,
    name: Py<PyString>,
    /// Called without arguments for the value a fresh scope starts with.
    initial: Py<PyAny>,
}

/// Every accessor. A module that is executed again has further ones of the same slots.
static LIVE: WeakList = WeakList::new();

/// The last accessor of each slot.
fn last_of_each_slot(py: Python<'_>) -> impl Iterator<Item = Bound<'_, ScopedGlobal>> {
    let live = LIVE.live::<ScopedGlobal>(py).into_iter();
    let by_slot: BTreeMap<_, _> = live.map(|it| (it.get().slot, it)).collect();
    by_slot.into_values()
}

/// Tells every module with accessors whether any scope exists. Changed code reads a global directly
/// while none does (`patching.rewrite`). To be called before code enters the first scope and after
/// the last has ended.
pub fn tell_modules(py: Python<'_>) -> PyResult<()> {
    let live = LIVE.live::<ScopedGlobal>(py);
    // From here on no Python runs: storing a bool under a name that exists runs none.
    let exist = !no_scope_exists();
    live.iter()
        .try_for_each(|it| it.get().owner.tell(py, exist))
}

/// The values with which every global begins in a fresh scope. Runs Python.
pub fn initial_values(py: Python<'_>) -> PyResult<Vec<(Bound<'_, ScopedGlobal>, Py<PyAny>)>> {
    let fresh = new_scope(py, "fresh".to_owned())?;
    // Some initial values read others.
    let inside = execution::derived(py, |it| it.scope = Some(fresh.clone().unbind()))?;
    let entry = Entry::new(py, Some(&inside))?;
    let found = last_of_each_slot(py)
        .map(|global| {
            let initial = global.get().value_in(py, Some(&fresh))?;
            Ok((global, initial))
        })
        .collect();
    entry.leave(py)?;
    found
}

/// Moves the values of the default scope to `scope`, and gives the default scope those of
/// `initial_values`. Runs no Python.
pub fn move_aside(
    py: Python<'_>,
    scope: &Bound<'_, Scope>,
    initial_values: &[(Bound<'_, ScopedGlobal>, Py<PyAny>)],
) -> PyResult<()> {
    for (global, initial) in initial_values {
        let it = global.get();
        if let Some(value) = it.owner.get(it.name.bind(py))? {
            it.owner.set(it.name.bind(py), initial.clone_ref(py))?;
            drop(scope.get().write(py, it.slot, Held::Value(value.unbind())));
        }
    }
    Ok(())
}

/// Undoes `move_aside`.
pub fn move_back(py: Python<'_>, scope: &Bound<'_, Scope>) -> PyResult<()> {
    for global in last_of_each_slot(py) {
        let it = global.get();
        if let Held::Value(value) = scope.get().read(py, it.slot) {
            it.owner.set(it.name.bind(py), value)?;
        }
    }
    scope.get().clear(py);
    Ok(())
}

impl ScopedGlobal {
    /// The value, if reading it runs no Python code and cannot fail.
    #[inline]
    pub fn at_hand(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        if no_scope_exists() {
            return self.at_hand_in_default(py);
        }
        self.at_hand_in_current(py)
    }

    #[inline]
    fn at_hand_in_default(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        match &self.owner {
            Owner::Globals(globals) => self.remembered.find(globals.bind(py), &self.name),
            Owner::Class(_) => None,
        }
    }

    /// Apart, so that the path of the only runner stays short.
    #[inline(never)]
    fn at_hand_in_current(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        match current_value(py, self.slot) {
            Ok(None) => self.at_hand_in_default(py),
            Ok(Some(Held::Value(value))) => Some(value),
            Ok(Some(Held::Unset | Held::Deleted)) | Err(_) => None,
        }
    }
}

#[pymethods]
impl ScopedGlobal {
    #[new]
    #[pyo3(signature = (owner, name, initial))]
    fn new(
        py: Python<'_>,
        owner: Owner,
        name: Py<PyString>,
        initial: Py<PyAny>,
    ) -> PyResult<Py<Self>> {
        let slot = slot_of(format!("{}.{}", owner.qualified(py)?, name.bind(py)));
        let made = Self {
            owner,
            name,
            initial,
            slot,
            remembered: Remembered::default(),
        };
        let made = Bound::new(py, made)?;
        LIVE.push(&made)?;
        made.get().owner.tell(py, !no_scope_exists())?;
        Ok(made.unbind())
    }

    #[getter]
    fn value(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let scope = current(py)?;
        self.value_in(py, scope.as_ref().map(|it| it.bind(py)))
    }

    #[setter]
    fn set_value(&self, py: Python<'_>, value: Py<PyAny>) -> PyResult<()> {
        let scope = current(py)?;
        self.set_value_in(py, scope.as_ref().map(|it| it.bind(py)), value)
    }

    #[deleter]
    fn delete_value(&self, py: Python<'_>) -> PyResult<()> {
        let Some(scope) = current(py)? else {
            return self.owner.delete(self.name.bind(py));
        };
        match scope.bind(py).get().write(py, self.slot, Held::Deleted) {
            Held::Deleted => Err(self.owner.missing(self.name.bind(py))),
            Held::Unset | Held::Value(_) => Ok(()),
        }
    }

    /// The value in `scope`, or the initial one; None is SGLang's default scope.
    #[pyo3(signature = (scope, /))]
    fn value_in(&self, py: Python<'_>, scope: Option<&Bound<'_, Scope>>) -> PyResult<Py<PyAny>> {
        let Some(scope) = scope else {
            return match self.owner.get(self.name.bind(py))? {
                Some(value) => Ok(value.unbind()),
                None => Err(self.owner.missing(self.name.bind(py))),
            };
        };
        let mut held = scope.get().read(py, self.slot);
        if matches!(held, Held::Unset) {
            let value = self.initial.call0(py)?;
            held = scope.get().write_if_unset(py, self.slot, value);
        }
        match held {
            Held::Value(value) => Ok(value),
            Held::Unset | Held::Deleted => Err(self.owner.missing(self.name.bind(py))),
        }
    }

    #[pyo3(signature = (scope, value, /))]
    fn set_value_in(
        &self,
        py: Python<'_>,
        scope: Option<&Bound<'_, Scope>>,
        value: Py<PyAny>,
    ) -> PyResult<()> {
        match scope {
            None => self.owner.set(self.name.bind(py), value),
            Some(scope) => {
                drop(scope.get().write(py, self.slot, Held::Value(value)));
                Ok(())
            }
        }
    }

    /// Whether `scope` has its own value, because it was read or written there before.
    #[pyo3(signature = (scope, /))]
    fn is_set_in(&self, py: Python<'_>, scope: &Bound<'_, Scope>) -> bool {
        matches!(scope.get().read(py, self.slot), Held::Value(_))
    }

    fn __repr__(&self) -> String {
        format!("<ScopedGlobal {}>", self.name)
    }

    #[allow(clippy::needless_pass_by_value)]
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.owner {
            Owner::Globals(globals) => visit.call(globals)?,
            Owner::Class(class) => visit.call(class)?,
        }
        visit.call(&self.initial)
    }
}
