//! Chooses std's or loom's locks; the only file that names a lock type.
//! Must never let a panic in one thread wedge the others: lock poisoning is ignored.

// Cargo does not know loom's cfg.
#![allow(unexpected_cfgs)]

use std::sync::PoisonError;
use std::time::Duration;

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

/// Locks although another thread panicked: every transition leaves the state whole before it can
/// panic, and a guard that wedges all threads after one panic is worse than the panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unlocks, sleeps until notified or for `slice` (for ever under loom), locks again.
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
