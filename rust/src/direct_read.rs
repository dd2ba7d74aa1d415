//! `ScopedGlobal.value`, read without detours: 130 reads in each forward.
//!
//! CPython looks an attribute up in the type and calls its descriptor; `PyO3`'s notes that the thread
//! is attached, catches panics and keeps errors. Where nothing can fail none of that is needed; where
//! something can, it is what happens.

use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::PyTypeInfo;

use crate::scoped_global::ScopedGlobal;

/// The interned "value", by which every read in code asks. Never freed.
static VALUE: AtomicPtr<ffi::PyObject> = AtomicPtr::new(std::ptr::null_mut());

/// What `ScopedGlobal` has as `tp_getattro`.
///
/// # Safety
/// As CPython calls it: attached, with a `ScopedGlobal` and a string.
unsafe extern "C" fn get_attribute(
    slf: *mut ffi::PyObject,
    name: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    if name == VALUE.load(Ordering::Relaxed) {
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
    // SAFETY: with what this was called with, as CPython would call it.
    unsafe { ffi::PyObject_GenericGetAttr(slf, name) }
}

/// Lets `ScopedGlobal` be read directly.
///
/// Not by defining `__getattribute__`: torch.compile traces no attribute of a class that has one
/// (2.14.1), and the attribute is still what its descriptor says.
pub fn put_in_front(py: Python<'_>) {
    let name = intern!(py, "value").clone().unbind();
    VALUE.store(name.into_ptr(), Ordering::Relaxed);
    let class = ScopedGlobal::type_object_raw(py);
    // SAFETY: attached, so nothing reads the slot meanwhile; PyO3 keeps the type for ever; both
    // functions have the signature of the slot. No attribute of the type says otherwise.
    unsafe { (*class).tp_getattro = Some(get_attribute) };
}
