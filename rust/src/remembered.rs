//! A value of a dictionary that is not looked up again while the dictionary is unchanged.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

/// A cached value, valid as long as the dictionary's version is the same. Every change of a
/// module's dictionary gives it a version that no dictionary had before (PEP 509). So the cache
/// needs no reference to the value: at that version the dictionary holds it.
///
/// For CPython 3.11 and 3.12; later versions no longer expose the version of a dictionary.
#[derive(Default)]
pub struct Remembered {
    #[cfg(not(Py_3_13))]
    version: std::sync::atomic::AtomicU64,
    #[cfg(not(Py_3_13))]
    value: std::sync::atomic::AtomicPtr<pyo3::ffi::PyObject>,
}

impl Remembered {
    /// The value of `name` in `dict`. Every call must pass the same `dict` and the same `name`.
    #[cfg(not(Py_3_13))]
    #[inline]
    #[allow(deprecated)] // 3.12 has it still
    pub fn find(&self, dict: &Bound<'_, PyDict>, name: &Py<PyString>) -> Option<Py<PyAny>> {
        use std::sync::atomic::Ordering::Relaxed; // the interpreter's lock gives the order

        let py = dict.py();
        // SAFETY: attached, and `dict` is alive and a dictionary.
        let version = unsafe { (*dict.as_ptr().cast::<pyo3::ffi::PyDictObject>()).ma_version_tag };
        if version == self.version.load(Relaxed) {
            let value = self.value.load(Relaxed);
            // SAFETY: not null, for no dictionary has version 0 and both were stored together with
            // the interpreter's lock held; alive, for `dict` holds it at this version.
            return Some(unsafe { Bound::from_borrowed_ptr(py, value) }.unbind());
        }
        self.look_up(dict, name, version)
    }

    #[cfg(not(Py_3_13))]
    #[cold]
    fn look_up(
        &self,
        dict: &Bound<'_, PyDict>,
        name: &Py<PyString>,
        version: u64,
    ) -> Option<Py<PyAny>> {
        use std::sync::atomic::Ordering::Relaxed; // as in `find`

        // A change that the lookup itself makes is noticed: the version was read before it.
        let value = dict.get_item(name).ok()??;
        self.value.store(value.as_ptr(), Relaxed);
        self.version.store(version, Relaxed);
        Some(value.unbind())
    }

    /// The value of `name` in `dict`.
    #[cfg(Py_3_13)]
    #[allow(clippy::unused_self)]
    pub fn find(&self, dict: &Bound<'_, PyDict>, name: &Py<PyString>) -> Option<Py<PyAny>> {
        Some(dict.get_item(name).ok()??.unbind())
    }
}
