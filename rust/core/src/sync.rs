//! The only file that names lock types, so that a model checker's can take their place.

use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use std::sync::{Condvar, Mutex};

/// Locks although another thread panicked: every transition leaves the state whole before it can
/// panic, and a guard that wedges all threads after one panic is worse than the panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a notification or for `slice` to pass, whichever is first.
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    slice: Duration,
) -> MutexGuard<'a, T> {
    condvar
        .wait_timeout(guard, slice)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}
