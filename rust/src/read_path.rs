//! The statics that every read of a scoped global loads, in one cache line. In a forward, whose
//! data evicts them, a read costs what it has to fetch (docs/COST.md).

use std::sync::atomic::{AtomicPtr, AtomicUsize};

use pyo3::ffi::PyObject;

#[repr(align(64))]
pub struct ReadPath {
    /// The interned string "value"; see `direct_read`. Never freed.
    pub name: AtomicPtr<PyObject>,
    /// The context variable; see `execution`. Never freed.
    pub variable: AtomicPtr<PyObject>,
    /// How many scopes exist. At 0 the running code must be in the default scope, without a look-up.
    pub scopes: AtomicUsize,
}

pub static READ_PATH: ReadPath = ReadPath {
    name: AtomicPtr::new(std::ptr::null_mut()),
    variable: AtomicPtr::new(std::ptr::null_mut()),
    scopes: AtomicUsize::new(0),
};
