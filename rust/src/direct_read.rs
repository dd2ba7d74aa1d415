//! Reads `ScopedGlobal.value` by a fast path: 130 reads in each forward.
//!
//! CPython looks an attribute up in the type and calls its descriptor. `PyO3`'s descriptor notes
//! that the thread is attached, catches panics and keeps errors. A read that cannot fail needs none
//! of that; any other read goes that way.

use std::sync::atomic::Ordering;

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::PyTypeInfo;

use crate::read_path::READ_PATH;
use crate::scoped_global::ScopedGlobal;

/// The `tp_getattro` of `ScopedGlobal`.
///
/// # Safety
/// Must be called as CPython calls it: attached, with a `ScopedGlobal` and a string.
unsafe extern "C" fn get_attribute(
    slf: *mut ffi::PyObject,
    name: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    if name == READ_PATH.name.load(Ordering::Relaxed) {
        // SAFETY: the interpreter calls this, so the thread is attached; `slf` is of the one type
        // that has this function, which cannot be subclassed, and its caller keeps it alive.
        let found = unsafe {
            let py = Python::assume_attached();
            let slf = Borrowed::from_ptr(py, slf).cast_unchecked::<ScopedGlobal>();
            slf.get().at_hand(py)
        };
        if let Some(value) = found {
            return value.into_ptr();
        }
    }
    // SAFETY: the arguments are those of this function, as CPython would pass them.
    unsafe { ffi::PyObject_GenericGetAttr(slf, name) }
}

/// Installs the fast path in the type of `ScopedGlobal`.
///
/// `__getattribute__` is not defined, because torch.compile (2.14.1) traces no attribute of a class
/// that has one. The attribute's value is still the one that its descriptor returns.
pub fn put_in_front(py: Python<'_>) {
    let name = intern!(py, "value").clone().unbind();
    READ_PATH.name.store(name.into_ptr(), Ordering::Relaxed);
    let class = ScopedGlobal::type_object_raw(py);
    // SAFETY: attached, so no thread reads the slot meanwhile; PyO3 never frees the type; both
    // functions have the slot's signature. No attribute of the type contradicts it.
    unsafe { (*class).tp_getattro = Some(get_attribute) };
}
