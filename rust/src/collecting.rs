//! Keeps Python's garbage collector from running finalizers for a moment.

use std::marker::PhantomData;

use pyo3::ffi;
use pyo3::prelude::*;

/// While it exists, no allocation collects garbage. No code but its maker's may run meanwhile.
pub struct CollectingOff<'py> {
    was_on: bool,
    attached: PhantomData<Python<'py>>,
}

impl<'py> CollectingOff<'py> {
    pub fn new(_attached: Python<'py>) -> Self {
        // SAFETY: the thread is attached.
        let was_on = unsafe { ffi::PyGC_Disable() } != 0;
        Self {
            was_on,
            attached: PhantomData,
        }
    }
}

impl Drop for CollectingOff<'_> {
    fn drop(&mut self) {
        if self.was_on {
            // SAFETY: the thread is attached: this cannot outlive `Python<'py>`.
            unsafe { ffi::PyGC_Enable() };
        }
    }
}
