//! Leases against teardown: no thread holds, joins or trusts state that was torn down.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::Arc;

use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::registry::{Registry, Step};
use distguard_core::teardown::Teardown;

use crate::common::{actor, begin_teardown, build, lease, request};
use crate::explore::{all, blocking, explore, publish, shared, spawn, Bound, Guarded};

const W: Key = Key::World;

/// Joins or makes the object, and holds it during use. Gets no lease if it changed in between.
fn use_it(registry: &Registry, thread: u64, object: &Guarded) {
    let generation = match blocking(registry, request(thread, 1)).unwrap() {
        Step::Lead(ticket) => {
            object.change();
            publish(registry, ticket)
        }
        Step::Join { generation } => generation,
        other => panic!("{other:?}"),
    };
    match registry.lease_at(&[(W, generation)], "a", &actor(thread)) {
        Ok(leases) => {
            object.read();
            assert!(registry.release(leases[0]));
        }
        Err(error) => assert_eq!(error, Error::NotReady { key: W }),
    }
}

/// Destroys the object unless a thread holds it or makes it.
fn tear_down(registry: &Registry, thread: u64, object: &Guarded) {
    match registry.begin_teardown(&W, &actor(thread), false) {
        Ok(Teardown::Begun { ticket, .. }) => {
            object.change();
            assert!(registry.end_teardown(ticket));
        }
        Ok(Teardown::Nothing) | Err(Error::InUse { .. } | Error::Busy { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn held_state_is_not_torn_down_and_torn_down_state_is_not_held() {
    explore(Bound::None, || {
        let (registry, object) = (shared(), Guarded::default());
        build(&registry, &request(0, 1), 7);
        let other = spawn(&registry, {
            let object = object.clone();
            move |registry| use_it(registry, 1, &object)
        });
        tear_down(&registry, 0, &object);
        other.join().unwrap();
    });
}

#[test]
fn a_lease_at_the_joined_generation_is_not_one_on_what_was_made_after_it() {
    explore(Bound::None, || {
        let (registry, object) = (shared(), Guarded::default());
        build(&registry, &request(0, 1), 7);
        // The generation that is alive now; only the leader writes it.
        let live = Arc::new(AtomicU64::new(1));
        let other = spawn(&registry, {
            let (object, live) = (object.clone(), live.clone());
            move |registry| {
                let generation = match registry.try_acquire(&request(1, 1)) {
                    Ok(Step::Join { generation }) => generation,
                    Ok(Step::Lead(ticket)) => {
                        assert!(registry.fail(ticket, "only joins"));
                        return;
                    }
                    _ => return,
                };
                if let Ok(leases) = registry.lease_at(&[(W, generation)], "a", &actor(1)) {
                    object.read();
                    assert_eq!(live.load(SeqCst), generation);
                    assert!(registry.release(leases[0]));
                }
            }
        });
        if let Ok(Teardown::Begun { ticket, .. }) = registry.begin_teardown(&W, &actor(0), false) {
            object.change();
            live.store(0, SeqCst);
            assert!(registry.end_teardown(ticket));
            let Ok(Step::Lead(ticket)) = blocking(&registry, request(0, 1)) else {
                panic!("no other thread publishes");
            };
            object.change();
            live.store(2, SeqCst);
            assert_eq!(publish(&registry, ticket), 2);
        }
        other.join().unwrap();
    });
}

#[test]
fn users_and_a_teardown_of_three_threads_never_overlap() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let (registry, object) = (shared(), Guarded::default());
        build(&registry, &request(0, 1), 7);
        let user = |thread| {
            let object = object.clone();
            move |registry: &Registry| use_it(registry, thread, &object)
        };
        let users = [spawn(&registry, user(1)), spawn(&registry, user(2))];
        tear_down(&registry, 0, &object);
        all(users);
    });
}

#[test]
fn no_thread_joins_a_generation_after_it_was_torn_down() {
    explore(Bound::None, || {
        let registry = shared();
        build(&registry, &request(0, 1), 7);
        let gone = Arc::new(AtomicBool::new(false));
        let other = spawn(&registry, {
            let gone = gone.clone();
            move |registry| {
                let was_gone = gone.load(SeqCst);
                match blocking(registry, request(1, 1)) {
                    Ok(Step::Join { generation: 1 }) => assert!(!was_gone),
                    Ok(Step::Lead(ticket)) => assert_eq!(publish(registry, ticket), 2),
                    other => panic!("{other:?}"),
                }
            }
        });
        let ticket = match registry.begin_teardown(&W, &actor(0), false) {
            Ok(Teardown::Begun { ticket, .. }) => ticket,
            other => panic!("{other:?}"),
        };
        assert!(registry.end_teardown(ticket));
        gone.store(true, SeqCst);
        other.join().unwrap();
    });
}

#[test]
fn a_teardown_that_fails_lets_its_waiters_join_the_state_that_remains() {
    explore(Bound::None, || {
        let (registry, object) = (shared(), Guarded::default());
        build(&registry, &request(0, 1), 7);
        let ticket = begin_teardown(&registry, &W, 0, false);
        let join = |thread| {
            let object = object.clone();
            move |registry: &Registry| {
                let step = blocking(registry, request(thread, 1));
                assert_eq!(step, Ok(Step::Join { generation: 1 }));
                object.read();
            }
        };
        let others = [spawn(&registry, join(1)), spawn(&registry, join(2))];
        object.change();
        assert!(registry.fail(ticket, "did not begin"));
        all(others);
    });
}

fn is_broken_by(checked: &Result<(), Error>, thread: u64) -> bool {
    matches!(checked, Err(Error::LeaseBroken { by: Some(by), .. }) if *by == actor(thread))
}

/// Checks the lease twice, then releases it; a lease that was broken once stays broken.
fn holder(held: LeaseId, gone: &Arc<AtomicBool>) -> impl FnOnce(&Registry) + 'static {
    let gone = gone.clone();
    move |registry| {
        let mut was_broken = false;
        for _ in 0..2 {
            let was_gone = gone.load(SeqCst);
            let checked = registry.check_leases(&[(W, held)]);
            let broken = is_broken_by(&checked, 0);
            assert!(broken || checked.is_ok(), "{checked:?}");
            assert!(broken || !(was_gone || was_broken));
            was_broken = broken;
        }
        registry.release(held);
        let Err(Error::LeaseBroken { by: None, .. }) = registry.check_leases(&[(W, held)]) else {
            panic!("a released lease is not held");
        };
    }
}

#[test]
fn a_lease_broken_by_force_is_never_good_again() {
    explore(Bound::None, || {
        let registry = shared();
        build(&registry, &request(0, 1), 7);
        let held = lease(&registry, &W, "a");
        let gone = Arc::new(AtomicBool::new(false));
        let other = spawn(&registry, holder(held, &gone));
        let ticket = begin_teardown(&registry, &W, 0, true);
        gone.store(true, SeqCst);
        assert!(registry.end_teardown(ticket));
        // Made anew for another holder, whose lease is independent of the old one.
        build(&registry, &request(0, 1), 8);
        let own = lease(&registry, &W, "b");
        assert_eq!(registry.check_leases(&[(W, own)]), Ok(()));
        other.join().unwrap();
        assert!(registry.release(own));
    });
}

#[test]
fn a_lease_broken_by_a_forced_reset_is_never_good_again() {
    explore(Bound::None, || {
        let registry = shared();
        build(&registry, &request(0, 1), 7);
        let held = lease(&registry, &W, "a");
        let gone = Arc::new(AtomicBool::new(false));
        let other = spawn(&registry, holder(held, &gone));
        assert_eq!(registry.reset(&actor(0), true), Ok(()));
        gone.store(true, SeqCst);
        other.join().unwrap();
    });
}
