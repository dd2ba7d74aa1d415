//! Leases, teardown, forgetting and reset. One thread; other threads are only names here.

mod common;

use common::*;
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::policy::Decision;
use distguard_core::registry::{Registry, Step};
use distguard_core::slot::Origin;
use distguard_core::snapshot::SlotState;
use distguard_core::teardown::Teardown;

const W: Key = Key::World;

fn ready() -> Registry {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    registry
}

fn poisoned() -> Registry {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    registry.poison(ticket, "half");
    registry
}

fn holders(registry: &Registry, key: &Key) -> Vec<String> {
    match slot(registry, key).state {
        SlotState::Ready { holders, .. } => holders.into_iter().map(|it| it.name).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn leases_are_taken_on_all_keys_or_on_none() {
    let registry = ready();
    let missing = [W, groups("a")];
    let refused = registry.lease(&missing, "a", &actor(1));
    assert_eq!(refused, Err(Error::NotReady { key: groups("a") }));
    assert!(holders(&registry, &W).is_empty());
    build(&registry, &request_for(1, &groups("a")), 8);
    let leases = registry.lease(&missing, "a", &actor(1)).unwrap();
    assert_eq!(leases.len(), 2);
    assert_eq!(holders(&registry, &W), ["a"]);
    assert_eq!(holders(&registry, &groups("a")), ["a"]);
}

#[test]
fn a_lease_is_released_once() {
    let registry = ready();
    let first = lease(&registry, &W, "a");
    let second = lease(&registry, &W, "b");
    assert!(registry.release(first));
    assert!(!registry.release(first));
    assert_eq!(holders(&registry, &W), ["b"]);
    assert!(registry.release(second));
}

#[test]
fn a_lease_can_insist_on_the_generation_that_was_joined() {
    let registry = ready();
    let Ok(Step::Join { generation }) = registry.try_acquire(&request(2, 1)) else {
        panic!("should join");
    };
    let joined = [(W, generation)];
    assert!(registry.lease_at(&joined, "a", &actor(2)).is_ok());
    let ticket = begin_teardown(&registry, &W, 1, true);
    registry.end_teardown(ticket);
    build(&registry, &request(1, 2), 8);
    let moved = registry.lease_at(&joined, "a", &actor(2));
    assert_eq!(moved, Err(Error::NotReady { key: W }));
}

#[test]
fn a_lease_on_an_earlier_generation_frees_nothing_of_a_later_one() {
    let registry = ready();
    let old = lease(&registry, &W, "a");
    let ticket = begin_teardown(&registry, &W, 1, true);
    registry.end_teardown(ticket);
    build(&registry, &request(1, 1), 8);
    let _new = lease(&registry, &W, "b");
    assert!(!registry.release(old));
    assert_eq!(holders(&registry, &W), ["b"]);
}

#[test]
fn leased_state_is_torn_down_only_by_force() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    let refused = registry.begin_teardown(&W, &actor(2), false);
    let Err(Error::InUse { holders, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(holders[0].name, "a");
    assert!(registry.is_ready(&W));
    let forced = registry.begin_teardown(&W, &actor(2), true);
    let Ok(Teardown::Begun { ticket, broken, .. }) = forced else {
        panic!("{forced:?}");
    };
    assert_eq!(broken, holders);
    assert!(registry.end_teardown(ticket));
    assert!(!registry.release(held));
}

#[test]
fn a_teardown_says_whether_the_registry_made_the_state() {
    for made in [Origin::Created, Origin::Adopted] {
        let registry = registry();
        let ticket = lead(&registry, &request(1, 1));
        let _ = registry.publish(ticket, spec(1), made, 7);
        let begun = registry.begin_teardown(&W, &actor(1), false);
        let Ok(Teardown::Begun { origin, .. }) = begun else {
            panic!("{begun:?}");
        };
        assert_eq!(origin, made);
    }
}

#[test]
fn there_is_nothing_to_tear_down_for_an_idle_or_poisoned_key() {
    let nothing = |registry: &Registry| registry.begin_teardown(&W, &actor(2), false);
    assert_eq!(nothing(&registry()), Ok(Teardown::Nothing));
    assert_eq!(nothing(&poisoned()), Ok(Teardown::Nothing));
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    registry.fail(ticket, "boom");
    assert_eq!(nothing(&registry), Ok(Teardown::Nothing));
}

#[test]
fn a_key_that_a_thread_is_changing_is_busy_for_all_other_threads() {
    let registry = registry();
    let build = lead(&registry, &request(1, 1));
    let busy = Error::Busy {
        key: W,
        leader: actor(1),
    };
    let others = registry.begin_teardown(&W, &actor(2), true);
    assert_eq!(others, Err(busy.clone()));
    let own = registry.begin_teardown(&W, &actor(1), false);
    assert_eq!(own, Ok(Teardown::Nothing));
    let _ = registry.publish(build, spec(1), Origin::Created, 7);
    let _teardown = begin_teardown(&registry, &W, 1, false);
    let others = registry.begin_teardown(&W, &actor(2), true);
    assert_eq!(others, Err(busy));
    let own = registry.begin_teardown(&W, &actor(1), false);
    assert_eq!(own, Ok(Teardown::Nothing));
}

#[test]
fn a_teardown_that_failed_leaves_the_state_as_it_was() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert!(registry.fail(ticket, "refused below"));
    let step = registry.try_acquire(&request(3, 1));
    assert_eq!(step, Ok(Step::Join { generation: 1 }));
    assert_eq!(holders(&registry, &W), ["a"]);
    assert!(registry.release(held));
}

#[test]
fn a_teardown_that_stopped_halfway_poisons_the_key() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    let ticket = begin_teardown(&registry, &W, 2, true);
    assert!(registry.poison(ticket, "half gone"));
    let refused = registry.try_acquire(&request(3, 1));
    assert!(matches!(refused, Err(Error::Poisoned { .. })));
    assert!(!registry.release(held));
}

#[test]
fn only_ready_state_without_leases_is_forgotten() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    assert!(!registry.forget(&W));
    registry.release(held);
    assert!(registry.forget(&W));
    assert!(!registry.forget(&W));
    assert!(!registry.forget(&groups("never asked for")));
    assert!(!poisoned().forget(&W));
    assert_eq!(build(&registry, &request(2, 2), 8), 2);
}

#[test]
fn a_removed_key_is_unknown_and_its_generations_are_never_used_again() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    assert!(!registry.remove(&W));
    registry.release(held);
    assert!(registry.remove(&W));
    assert!(!registry.remove(&W));
    assert_eq!(registry.snapshot().slot(&W), None);
    let ticket = lead(&registry, &request(1, 1));
    assert!(!registry.remove(&W));
    let generation = registry.publish(ticket, spec(1), Origin::Created, 8);
    assert_eq!(generation, Ok(2));
}

#[test]
fn reset_leaves_nothing_behind_but_the_generations() {
    let registry = poisoned();
    let key = groups("a");
    build(&registry, &request_for(1, &key), 8);
    assert_eq!(registry.reset(&actor(1), false), Ok(()));
    for key in [&W, &key] {
        assert_eq!(slot(&registry, key).state, SlotState::Idle);
    }
    assert_eq!(build(&registry, &request(1, 1), 7), 1);
    assert_eq!(build(&registry, &request_for(1, &key), 8), 2);
    let resets = decisions(&registry);
    let resets = resets.iter().filter(|it| **it == Decision::Reset);
    assert_eq!(resets.count(), 2);
}

#[test]
fn reset_is_refused_while_anything_is_held_unless_forced() {
    let registry = ready();
    build(&registry, &request_for(1, &groups("a")), 8);
    let held = lease(&registry, &W, "a");
    let refused = registry.reset(&actor(1), false);
    assert!(matches!(refused, Err(Error::InUse { key: W, .. })));
    assert!(registry.is_ready(&W) && registry.is_ready(&groups("a")));
    assert_eq!(registry.reset(&actor(1), true), Ok(()));
    assert!(!registry.release(held));
}

#[test]
fn reset_is_refused_while_a_thread_is_changing_any_key_even_if_forced() {
    let registry = ready();
    let key = groups("a");
    let ticket = lead(&registry, &request_for(2, &key));
    let busy = Err(Error::Busy {
        key,
        leader: actor(2),
    });
    assert_eq!(registry.reset(&actor(1), true), busy);
    assert!(registry.is_ready(&W));
    registry.fail(ticket, "boom");
    assert_eq!(registry.reset(&actor(1), true), Ok(()));
}

#[test]
fn leases_and_teardowns_are_recorded() {
    let registry = ready();
    let held = lease(&registry, &W, "a");
    let _ = registry.begin_teardown(&W, &actor(2), false);
    registry.release(held);
    let ticket = begin_teardown(&registry, &W, 2, false);
    registry.end_teardown(ticket);
    let _ = registry.lease(&[W], "b", &actor(2));
    let expected = [
        Decision::Lead,
        Decision::Publish,
        Decision::Lease,
        Decision::Refuse,
        Decision::Release,
        Decision::Teardown,
        Decision::TornDown,
        Decision::Refuse,
    ];
    assert_eq!(decisions(&registry), expected);
}
