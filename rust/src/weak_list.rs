//! All live objects of one class, oldest first.

use std::sync::Mutex;

use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};
use pyo3::PyClass;

use crate::sync::lock;

/// Weak references to objects; keeps none alive.
pub struct WeakList(Mutex<Vec<Py<PyWeakrefReference>>>);

impl WeakList {
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    pub fn push<T: PyClass>(&self, object: &Bound<'_, T>) -> PyResult<()> {
        let weak = PyWeakrefReference::new(object.as_any())?.unbind();
        lock(&self.0).push(weak);
        Ok(())
    }

    /// The objects that are alive, oldest first.
    pub fn live<'py, T: PyClass>(&self, py: Python<'py>) -> Vec<Bound<'py, T>> {
        let known: Vec<_> = lock(&self.0).iter().map(|it| it.clone_ref(py)).collect();
        // Upgraded without the lock: that may run Python.
        let (found, ended): (Vec<_>, Vec<_>) = known
            .into_iter()
            .map(|weak| (weak.bind(py).upgrade(), weak))
            .partition(|(object, _)| object.is_some());
        if !ended.is_empty() {
            let mut now = lock(&self.0);
            let (gone, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut *now)
                .into_iter()
                .partition(|weak| ended.iter().any(|(_, gone)| gone.is(weak)));
            *now = kept;
            drop(now);
            drop(gone); // only now: dropping a weak reference may run Python, too
        }
        let found = found.into_iter();
        found
            .filter_map(|(object, _)| object?.cast_into().ok())
            .collect()
    }
}
