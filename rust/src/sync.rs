//! How the binding locks. Nothing of it is held while Python runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks although another thread panicked: what is locked here is whole between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
