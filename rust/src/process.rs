//! What exists once per process: the registry, the ledger of scopes, what joiners are given.
//! A forked child starts afresh: the parent's, whose locks other threads may have held, is left.

use std::collections::HashMap;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use distguard_core::clock::SystemClock;
use distguard_core::events::Event;
use distguard_core::key::Key;
use distguard_core::occupancy::Occupancy;
use distguard_core::registry::Registry;
use distguard_core::scopes::Scopes;
use pyo3::prelude::*;

use crate::sync::lock;

struct Process {
    registry: Registry,
    scopes: Scopes,
    occupancy: Occupancy,
    resources: Mutex<HashMap<Key, Py<PyAny>>>,
    /// The number of the first event that nobody has taken yet.
    untaken: Mutex<u64>,
}

impl Process {
    /// Never freed: there is one per process, and one more per fork between it and the first.
    fn make() -> *mut Self {
        let instance = FORKS.load(Ordering::Relaxed);
        Box::leak(Box::new(Self {
            registry: Registry::with_instance(Arc::new(SystemClock::default()), instance),
            scopes: Scopes::with_instance(instance),
            occupancy: Occupancy::new(),
            resources: Mutex::default(),
            untaken: Mutex::default(),
        }))
    }
}

static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

/// How many forks lie between this process and the one that imported the module. What it made
/// before a fork carries the number and is known by it, at no cost of a system call.
static FORKS: AtomicU32 = AtomicU32::new(0);

fn process() -> &'static Process {
    let mut current = CURRENT.load(Ordering::Acquire);
    if current.is_null() {
        let made = Process::make();
        let was = std::ptr::null_mut();
        // Of several first callers one wins; what the others made holds nothing yet.
        current = match CURRENT.compare_exchange(was, made, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => made,
            Err(first) => first,
        };
    }
    // SAFETY: not null; comes from `Process::make`, which leaks it, so it is valid for ever, and
    // nothing hands out a mutable reference to it.
    unsafe { &*current }
}

/// In a forked child, while it has one thread: a process without history.
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

pub fn occupancy() -> &'static Occupancy {
    &process().occupancy
}

/// Each event is returned once, also when several threads ask at the same time.
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
