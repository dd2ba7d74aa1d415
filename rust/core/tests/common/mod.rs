//! Helpers that the registry's tests share: short ways to make requests.

// Every test file uses only some of them.
#![allow(dead_code)]

use std::sync::Arc;
use std::time::Duration;

use distguard_core::actor::{Actor, ThreadId};
use distguard_core::clock::ManualClock;
use distguard_core::enter::Entry;
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::phases::{Access, VisitId};
use distguard_core::policy::{Decision, Policy};
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Ticket};
use distguard_core::snapshot::SlotSnapshot;
use distguard_core::spec::Spec;
use distguard_core::teardown::Teardown;

/// Longer than any test may take: a thread that sleeps that long was not woken.
pub const FOREVER: Duration = Duration::from_secs(600);

pub fn registry() -> Registry {
    Registry::new(Arc::new(ManualClock::new()))
}

pub fn actor(thread: u64) -> Actor {
    Actor {
        thread: ThreadId(thread),
        thread_name: format!("t{thread}").into(),
        runner: None,
    }
}

pub fn spec(tp: i64) -> Spec {
    Spec::from_iter([("tp", tp)])
}

pub fn groups(label: &str) -> Key {
    Key::Groups(label.into())
}

/// `thread` asks for the world with `tp`, may reuse it, and has not looked whether it exists.
pub fn request(thread: u64, tp: i64) -> Request {
    Request {
        key: Key::World,
        spec: spec(tp),
        policy: Policy {
            reuse: true,
            reentrant: false,
        },
        actor: actor(thread),
        observed: Observed::Unknown,
        waited: Duration::ZERO,
        slow_after: FOREVER,
    }
}

pub fn request_for(thread: u64, key: &Key) -> Request {
    let key = key.clone();
    Request {
        key,
        ..request(thread, 1)
    }
}

pub fn observing(observed: Observed, request: Request) -> Request {
    Request {
        observed,
        ..request
    }
}

pub fn lead(registry: &Registry, request: &Request) -> Ticket {
    match registry.try_acquire(request) {
        Ok(Step::Lead(ticket)) => ticket,
        other => panic!("should lead, but: {other:?}"),
    }
}

/// Acquires, and waits without a deadline: only a wake-up ends the wait.
pub fn acquire(
    registry: &Registry,
    mut request: Request,
    observe: impl Fn() -> Observed,
) -> Result<Step, Error> {
    loop {
        request.observed = observe();
        match registry.try_acquire(&request) {
            Ok(Step::Wait { epoch, .. }) => registry.wait(&request, epoch, FOREVER),
            step => return step,
        }
    }
}

/// Lines up, and waits without a deadline: only a wake-up ends the wait.
pub fn enter(registry: &Registry, phase: impl Into<Access>, thread: u64) -> Result<VisitId, Error> {
    let (visit, mut entry) = registry.arrive(phase, &actor(thread))?;
    while let Entry::Wait { epoch, .. } = entry {
        registry.wait_to_enter(visit, epoch, FOREVER);
        entry = registry.try_enter(visit)?;
    }
    Ok(visit)
}

/// Enters at once.
pub fn inside(registry: &Registry, phase: impl Into<Access>, thread: u64) -> VisitId {
    match registry.arrive(phase, &actor(thread)) {
        Ok((visit, Entry::Inside)) => visit,
        other => panic!("should be inside, but: {other:?}"),
    }
}

/// Lines up and must wait.
pub fn in_line(registry: &Registry, phase: impl Into<Access>, thread: u64) -> VisitId {
    match registry.arrive(phase, &actor(thread)) {
        Ok((visit, Entry::Wait { .. })) => visit,
        other => panic!("should be in line, but: {other:?}"),
    }
}

/// Leads and publishes with the request's own spec.
pub fn build(registry: &Registry, request: &Request, identity: u64) -> u64 {
    let ticket = lead(registry, request);
    registry
        .publish(ticket, request.spec.clone(), Origin::Created, identity)
        .unwrap()
}

pub fn lease(registry: &Registry, key: &Key, name: &str) -> LeaseId {
    let keys = [key.clone()];
    registry.lease(&keys, name, &actor(1)).unwrap()[0]
}

pub fn begin_teardown(registry: &Registry, key: &Key, thread: u64, force: bool) -> Ticket {
    match registry.begin_teardown(key, &actor(thread), force) {
        Ok(Teardown::Begun { ticket, .. }) => ticket,
        other => panic!("should tear down, but: {other:?}"),
    }
}

pub fn slot(registry: &Registry, key: &Key) -> SlotSnapshot {
    registry.snapshot().slot(key).expect("key is known").clone()
}

pub fn decisions(registry: &Registry) -> Vec<Decision> {
    let snapshot = registry.snapshot();
    snapshot.events.iter().map(|event| event.decision).collect()
}

pub fn is_wait(step: &Result<Step, Error>) -> bool {
    matches!(step, Ok(Step::Wait { .. }))
}

/// Lets other threads run until `condition` is true.
pub fn until(condition: impl Fn() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}
