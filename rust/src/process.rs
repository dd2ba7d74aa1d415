//! The state that exists once per process: registry, ledger of scopes, resources for joiners.
//! A forked child makes its own and never touches its parent's, whose locks threads may have held.

use std::collections::HashMap;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use distguard_core::budgets::Budgets;
use distguard_core::calls::Calls;
use distguard_core::clock::SystemClock;
use distguard_core::events::Event;
use distguard_core::key::Key;
use distguard_core::occupancy::Occupancy;
use distguard_core::registry::Registry;
use distguard_core::scopes::{ScopeId, Scopes};
use pyo3::prelude::*;

use crate::sync::lock;

struct Process {
    registry: Registry,
    scopes: Scopes,
    calls: Calls,
    budgets: Budgets,
    communicators: Mutex<HashMap<ScopeId, Occupancy>>,
    resources: Mutex<HashMap<Key, Py<PyAny>>>,
    /// The number of the first event that was not taken yet.
    untaken: Mutex<u64>,
}

impl Process {
    /// Never freed: a process has one, and one more for each fork between it and the first process.
    fn make() -> *mut Self {
        let instance = FORKS.load(Ordering::Relaxed);
        Box::leak(Box::new(Self {
            registry: Registry::with_instance(Arc::new(SystemClock::default()), instance),
            scopes: Scopes::with_instance(instance),
            calls: Calls::default(),
            budgets: Budgets::default(),
            communicators: Mutex::default(),
            resources: Mutex::default(),
            untaken: Mutex::default(),
        }))
    }
}

static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

/// How many forks lie between this process and the one that imported the module. Objects carry the
/// number at which they were made, which identifies inherited ones without a system call.
static FORKS: AtomicU32 = AtomicU32::new(0);

fn process() -> &'static Process {
    let mut current = CURRENT.load(Ordering::Acquire);
    if current.is_null() {
        let made = Process::make();
        let was = std::ptr::null_mut();
        // Of several first callers one wins; the objects that the others made are still empty.
        current = match CURRENT.compare_exchange(was, made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => made,
            Err(first) => first,
        };
    }
    // SAFETY: not null; comes from `Process::make`, which leaks it, so it stays valid, and no code
    // hands out a mutable reference to it.
    unsafe { &*current }
}

/// Begins with an empty registry; for a forked child, while it has one thread.
pub fn start_afresh() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    CURRENT.store(Process::make(), Ordering::Release);
}

/// See `FORKS`.
pub fn forks() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

pub fn registry() -> &'static Registry {
    &process().registry
}

pub fn scopes() -> &'static Scopes {
    &process().scopes
}

/// The calls that are inside methods of managers.
pub fn calls() -> &'static Calls {
    &process().calls
}

/// What was promised of each device's memory.
pub fn budgets() -> &'static Budgets {
    &process().budgets
}

/// The occupied communicators, by the scope whose runners use them.
pub fn communicators() -> MutexGuard<'static, HashMap<ScopeId, Occupancy>> {
    lock(&process().communicators)
}

/// Returns each event once, also when several threads ask at the same time.
pub fn take_events() -> Vec<Event> {
    let mut untaken = lock(&process().untaken);
    let events = registry().events_since(*untaken);
    if let Some(last) = events.last() {
        *untaken = last.seq + 1;
    }
    events
}

fn resources() -> MutexGuard<'static, HashMap<Key, Py<PyAny>>> {
    lock(&process().resources)
}

/// The resource that the leader of `key` published for joiners, while it can be joined.
pub fn resource(py: Python<'_>, key: &Key) -> Option<Py<PyAny>> {
    if !registry().is_ready(key) {
        return None;
    }
    resources().get(key).map(|value| value.clone_ref(py))
}

/// Sets or removes the resource of `key`; the former one is dropped after the lock is released.
pub fn set_resource(key: &Key, value: Option<Py<PyAny>>) {
    let mut held = resources();
    let before = match value {
        Some(value) => held.insert(key.clone(), value),
        None => held.remove(key),
    };
    drop(held);
    drop(before);
}

/// Removes all resources.
pub fn clear_resources() {
    let before = std::mem::take(&mut *resources());
    drop(before);
}
