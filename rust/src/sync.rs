//! The locking of the binding. No lock is held while Python runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks even after another thread panicked: the data is consistent between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
