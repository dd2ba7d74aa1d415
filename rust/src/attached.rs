//! Data that only attached threads touch: the interpreter's lock is its lock.

use std::cell::RefCell;

use pyo3::prelude::*;

#[cfg(Py_GIL_DISABLED)]
compile_error!("without the GIL being attached excludes no other thread: `Attached` needs a mutex");

/// A value that needs no lock of its own, because each access has the interpreter's. A mutex would
/// add two atomic operations to each read of a scoped global.
#[derive(Default)]
pub struct Attached<T>(RefCell<T>);

// SAFETY: every access needs the GIL, which orders the accesses of all threads. If `look` released
// it, a second thread would find the cell borrowed and panic; it would not touch the value.
unsafe impl<T: Send> Sync for Attached<T> {}

impl<T> Attached<T> {
    /// Calls `look`, which must not run Python, with the value.
    #[inline]
    pub fn with<R>(&self, _attached: Python<'_>, look: impl FnOnce(&mut T) -> R) -> R {
        look(&mut self.0.borrow_mut())
    }

    /// As `with`, for `__traverse__`, which gets no token of the GIL that its caller holds.
    /// Does nothing while the value is in use.
    ///
    /// # Safety
    /// The calling thread must be attached.
    pub unsafe fn peek<R>(&self, look: impl FnOnce(&T) -> R) -> Option<R> {
        self.0.try_borrow().ok().map(|value| look(&value))
    }
}
