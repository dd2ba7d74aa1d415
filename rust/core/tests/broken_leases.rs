//! Leases whose state was destroyed while they were held, and state inherited over a fork.
//! One thread; other threads are only names here.

mod common;

use std::sync::Arc;

use common::*;
use distguard_core::clock::ManualClock;
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::registry::{Observed, Registry, Step};
use distguard_core::slot::Origin;
use distguard_core::teardown::Teardown;

const W: Key = Key::World;

/// A registry whose world is leased.
fn leased() -> (Registry, LeaseId) {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    let held = lease(&registry, &W, "a");
    assert_eq!(registry.check_leases(&[(W, held)]), Ok(()));
    (registry, held)
}

/// The thread that broke the lease, and how; no thread if the lease was released.
fn broken(registry: &Registry, key: &Key, held: LeaseId) -> (Option<u64>, String) {
    match registry.check_leases(&[(key.clone(), held)]) {
        Err(Error::LeaseBroken { key: of, by, how }) => {
            assert_eq!(of, *key);
            (by.map(|it| it.thread.0), how)
        }
        other => panic!("{other:?}"),
    }
}

/// The lease is reported as broken until it is released, also after the state was made anew.
fn assert_broken_until_released(registry: &Registry, held: LeaseId, by: u64, how: &str) {
    for _ in 0..2 {
        let (who, what) = broken(registry, &W, held);
        assert_eq!(who, Some(by));
        assert!(what.contains(how), "{what}");
    }
    if !registry.is_ready(&W) {
        build(registry, &request(5, 1), 9);
        assert_eq!(broken(registry, &W, held).0, Some(by));
    }
    assert!(!registry.release(held));
    assert_eq!(broken(registry, &W, held).0, None);
}

#[test]
fn a_forced_teardown_breaks_leases_from_its_beginning_on() {
    let (registry, held) = leased();
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert_eq!(broken(&registry, &W, held).0, Some(2));
    assert!(registry.end_teardown(ticket));
    assert_broken_until_released(&registry, held, 2, "tore it down by force");
}

#[test]
fn a_forced_teardown_that_stopped_halfway_has_broken_the_leases() {
    let (registry, held) = leased();
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert!(registry.poison(ticket, "half gone"));
    assert_eq!(broken(&registry, &W, held).0, Some(2));
    assert_eq!(registry.reset(&actor(3), false), Ok(()));
    assert_broken_until_released(&registry, held, 2, "tore it down by force");
}

#[test]
fn a_forced_teardown_that_changed_nothing_has_broken_nothing() {
    let (registry, held) = leased();
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert!(registry.fail(ticket, "did not begin"));
    assert_eq!(registry.check_leases(&[(W, held)]), Ok(()));
}

#[test]
fn a_forced_reset_breaks_leases() {
    let (registry, held) = leased();
    assert!(registry.reset(&actor(2), false).is_err());
    assert_eq!(registry.check_leases(&[(W, held)]), Ok(()));
    assert_eq!(registry.reset(&actor(2), true), Ok(()));
    assert_broken_until_released(&registry, held, 2, "reset");
}

#[test]
fn a_change_outside_of_the_registry_breaks_leases() {
    let (registry, held) = leased();
    let gone = observing(Observed::Absent, request(2, 1));
    assert!(is_wait(&registry.try_acquire(&gone)));
    // One observation may have been made before the publish.
    assert_eq!(registry.check_leases(&[(W, held)]), Ok(()));
    build(&registry, &gone, 8);
    assert_broken_until_released(&registry, held, 2, "outside of sglang_distguard");
}

#[test]
fn a_released_lease_is_broken_by_no_later_change_of_the_state() {
    let (registry, held) = leased();
    assert!(registry.release(held));
    assert_eq!(broken(&registry, &W, held).0, None);
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert_eq!(broken(&registry, &W, held).0, None);
    assert!(registry.end_teardown(ticket));
    let _ticket = lead(&registry, &request(3, 1));
    assert_eq!(broken(&registry, &W, held).0, None);
}

#[test]
fn a_lease_released_during_a_teardown_is_not_broken_by_it() {
    let (registry, held) = leased();
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert!(registry.release(held));
    assert!(registry.end_teardown(ticket));
    assert_eq!(broken(&registry, &W, held).0, None);
}

#[test]
fn the_first_lease_that_is_not_good_is_named() {
    let (registry, world) = leased();
    let key = groups("a");
    build(&registry, &request_for(1, &key), 8);
    let own = lease(&registry, &key, "a");
    let both = [(W, world), (key.clone(), own)];
    assert_eq!(registry.check_leases(&[]), Ok(()));
    assert_eq!(registry.check_leases(&both), Ok(()));
    // A lease is good for its own key and for no other.
    assert_eq!(broken(&registry, &key, world).0, None);
    let ticket = begin_teardown(&registry, &key, 2, true);
    assert!(registry.end_teardown(ticket));
    assert_eq!(broken(&registry, &key, own).0, Some(2));
    let checked = registry.check_leases(&both);
    assert!(matches!(checked, Err(Error::LeaseBroken { key: of, .. }) if of == key));
    assert_eq!(registry.check_leases(&both[..1]), Ok(()));
}

#[test]
fn a_lease_of_another_registry_is_not_good() {
    let (_parent, inherited) = leased();
    let child = Registry::with_instance(Arc::new(ManualClock::new()), 4711);
    build(&child, &request(1, 1), 7);
    assert_eq!(broken(&child, &W, inherited).0, None);
}

#[test]
fn a_request_that_observes_an_object_inherited_over_a_fork_is_refused() {
    let registry = registry();
    registry.inherit(&W, 7);
    let inherited = observing(Observed::Present(7), request(1, 1));
    for _ in 0..2 {
        let refused = registry.try_acquire(&inherited);
        assert_eq!(refused, Err(Error::Inherited { key: W }));
    }
    // The request is refused and does not lead: others find the key idle.
    assert_eq!(
        slot(&registry, &W).state,
        distguard_core::snapshot::SlotState::Idle
    );
    let other = observing(Observed::Present(8), request(1, 1));
    let Ok(Step::Adopt(ticket)) = registry.try_acquire(&other) else {
        panic!("another object is the process's own");
    };
    assert_eq!(registry.publish(ticket, spec(1), Origin::Adopted, 8), Ok(1));
    let joined = registry.try_acquire(&other);
    assert_eq!(joined, Ok(Step::Join { generation: 1 }));
}

#[test]
fn an_inherited_object_that_is_gone_blocks_no_request() {
    let registry = registry();
    registry.inherit(&W, 7);
    for observed in [Observed::Absent, Observed::Unknown] {
        let ticket = lead(&registry, &observing(observed, request(1, 1)));
        assert!(registry.fail(ticket, "only a look"));
    }
}

#[test]
fn an_inherited_object_that_is_observed_again_is_refused_not_adopted() {
    let registry = registry();
    registry.inherit(&W, 7);
    build(&registry, &request(1, 1), 8);
    let inherited = observing(Observed::Present(7), request(2, 1));
    assert!(is_wait(&registry.try_acquire(&inherited)));
    let refused = registry.try_acquire(&inherited);
    assert_eq!(refused, Err(Error::Inherited { key: W }));
    assert_eq!(registry.reset(&actor(1), true), Ok(()));
    let refused = registry.try_acquire(&inherited);
    assert_eq!(refused, Err(Error::Inherited { key: W }));
}

#[test]
fn holders_are_told_why_a_forced_teardown_was_begun() {
    let (registry, held) = leased();
    let begun = registry.begin_teardown_because(&W, &actor(2), true, "rank 1 is silent");
    let Ok(Teardown::Begun { ticket, .. }) = begun else {
        panic!("{begun:?}")
    };
    let told = |registry: &Registry| broken(registry, &W, held).1;
    assert_eq!(
        told(&registry),
        "is tearing it down by force, because rank 1 is silent"
    );
    assert!(registry.end_teardown(ticket));
    assert_eq!(
        told(&registry),
        "tore it down by force, because rank 1 is silent"
    );
}
