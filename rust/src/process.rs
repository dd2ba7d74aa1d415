//! What exists once per process: the registry, the ledger of scopes, and what joiners are given.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use distguard_core::clock::SystemClock;
use distguard_core::key::Key;
use distguard_core::registry::Registry;
use distguard_core::scopes::Scopes;
use pyo3::prelude::*;

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(Arc::new(SystemClock::default())));
static SCOPES: LazyLock<Scopes> = LazyLock::new(Scopes::default);
static RESOURCES: LazyLock<Mutex<HashMap<Key, Py<PyAny>>>> = LazyLock::new(Mutex::default);

pub fn registry() -> &'static Registry {
    &REGISTRY
}

pub fn scopes() -> &'static Scopes {
    &SCOPES
}

fn resources() -> MutexGuard<'static, HashMap<Key, Py<PyAny>>> {
    RESOURCES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the leader of `key` published for joiners, while it can be joined.
pub fn resource(py: Python<'_>, key: &Key) -> Option<Py<PyAny>> {
    if !registry().is_ready(key) {
        return None;
    }
    resources().get(key).map(|value| value.clone_ref(py))
}

/// Sets or removes it; what was there before is dropped after the lock is free.
pub fn set_resource(key: &Key, value: Option<Py<PyAny>>) {
    let mut held = resources();
    let before = match value {
        Some(value) => held.insert(key.clone(), value),
        None => held.remove(key),
    };
    drop(held);
    drop(before);
}

/// Forgets all of them.
pub fn clear_resources() {
    let before = std::mem::take(&mut *resources());
    drop(before);
}
