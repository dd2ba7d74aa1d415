//! Chooses std's, loom's or shuttle's locks; the only file that names a lock type.
//! Must never let a panic in one thread block the others: lock poisoning is ignored.

use std::sync::PoisonError;
use std::time::Duration;

#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicU64;
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(shuttle)]
pub(crate) use shuttle::sync::atomic::AtomicU64;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::atomic::AtomicU64;
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

/// Locks even if another thread panicked. Every transition leaves the state consistent before it
/// can panic, and a guard that blocks all threads after one panic is worse than the panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unlocks, sleeps until notified or for `slice`, locks again. The model checkers have no time:
/// there it sleeps until notified, so that they report a lost wake-up as a deadlock.
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    slice: Duration,
) -> MutexGuard<'a, T> {
    if cfg!(any(loom, shuttle)) {
        return condvar.wait(guard).unwrap_or_else(PoisonError::into_inner);
    }
    condvar
        .wait_timeout(guard, slice)
        .unwrap_or_else(PoisonError::into_inner)
        .0
}
