//! The slot protocol: one leader at a time, all others join, a leader that ends hands over.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;

use distguard_core::error::Error;
use distguard_core::guard::LeadGuard;
use distguard_core::key::Key;
use distguard_core::policy::Decision;
use distguard_core::registry::{Observed, Registry, Step};
use distguard_core::slot::Origin;

use crate::common::{acquire, decisions, groups, lead, request, request_for, slot, spec};
use crate::explore::{all, blocking, explore, publish, shared, spawn, Bound, Guarded};

const W: Key = Key::World;

fn count(registry: &Registry, decision: Decision) -> usize {
    let decisions = decisions(registry);
    decisions.iter().filter(|it| **it == decision).count()
}

/// Makes the object and publishes it, or uses the published one.
fn lead_or_join(thread: u64, object: &Guarded) -> impl FnOnce(&Registry) + 'static {
    let object = object.clone();
    move |registry| match blocking(registry, request(thread, 1)) {
        Ok(Step::Lead(ticket)) => {
            object.change();
            assert_eq!(publish(registry, ticket), 1);
        }
        Ok(Step::Join { generation: 1 }) => object.read(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn of_two_equal_threads_one_leads_and_the_other_joins() {
    explore(Bound::None, || {
        let (registry, object) = (shared(), Guarded::default());
        let ask = |thread| lead_or_join(thread, &object);
        let other = spawn(&registry, ask(1));
        ask(0)(&registry);
        other.join().unwrap();
        assert_eq!(count(&registry, Decision::Lead), 1);
        assert_eq!(count(&registry, Decision::Join), 1);
    });
}

#[test]
fn of_three_equal_threads_one_leads_and_the_others_join() {
    explore(Bound::Preemptions { full: 6, short: 3 }, || {
        let (registry, object) = (shared(), Guarded::default());
        let ask = |thread| lead_or_join(thread, &object);
        let others = [spawn(&registry, ask(1)), spawn(&registry, ask(2))];
        ask(0)(&registry);
        all(others);
        assert_eq!(count(&registry, Decision::Lead), 1);
        assert_eq!(count(&registry, Decision::Join), 2);
    });
}

#[test]
fn a_failing_leader_hands_over_to_one_of_two_waiters() {
    explore(Bound::None, || {
        let (registry, object) = (shared(), Guarded::default());
        let first = lead(&registry, &request(0, 1));
        let ask = |thread| lead_or_join(thread, &object);
        let others = [spawn(&registry, ask(1)), spawn(&registry, ask(2))];
        object.change();
        assert!(registry.fail(first, "boom"));
        all(others);
        assert_eq!(count(&registry, Decision::Lead), 2);
        assert_eq!(count(&registry, Decision::Join), 1);
    });
}

#[test]
fn leaders_that_fail_one_after_the_other_leave_no_waiter_behind() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let (registry, object) = (shared(), Guarded::default());
        let ask = |thread| {
            let object = object.clone();
            move |registry: &Registry| match blocking(registry, request(thread, 1)) {
                Ok(Step::Lead(ticket)) => {
                    object.change();
                    assert!(registry.fail(ticket, "boom"));
                }
                other => panic!("no thread publishes: {other:?}"),
            }
        };
        let others = [spawn(&registry, ask(1)), spawn(&registry, ask(2))];
        ask(0)(&registry);
        all(others);
        assert_eq!(slot(&registry, &W).failures, 3);
    });
}

#[test]
fn a_leader_that_drops_its_guard_hands_over() {
    explore(Bound::None, || {
        let registry = shared();
        let first = lead(&registry, &request(0, 1));
        let other = spawn(&registry, |registry| blocking(registry, request(1, 1)));
        drop(LeadGuard::new(&registry, first));
        let Ok(Step::Lead(ticket)) = other.join().unwrap() else {
            panic!("no other thread leads");
        };
        let reason = slot(&registry, &W).last_failure;
        assert_eq!(reason.as_deref(), Some("the leader ended without a result"));
        publish(&registry, ticket);
    });
}

#[test]
fn a_leader_that_panics_hands_over() {
    explore(Bound::None, || {
        let registry = shared();
        let first = lead(&registry, &request(0, 1));
        let other = spawn(&registry, |registry| blocking(registry, request(1, 1)));
        let dying = std::panic::AssertUnwindSafe(|| {
            let _guard = LeadGuard::new(&registry, first);
            // Unwinds without the noise of panic!.
            std::panic::resume_unwind(Box::new("the initialiser panicked"));
        });
        assert!(std::panic::catch_unwind(dying).is_err());
        let Ok(Step::Lead(ticket)) = other.join().unwrap() else {
            panic!("no other thread leads");
        };
        let reason = slot(&registry, &W).last_failure;
        assert_eq!(reason.as_deref(), Some("the leader panicked"));
        publish(&registry, ticket);
    });
}

#[test]
fn a_poisoned_key_ends_every_wait() {
    explore(Bound::None, || {
        let registry = shared();
        let first = lead(&registry, &request(0, 1));
        let ask = |thread| move |registry: &Registry| blocking(registry, request(thread, 1));
        let others = [spawn(&registry, ask(1)), spawn(&registry, ask(2))];
        assert!(registry.poison(first, "half"));
        for other in others {
            let refused = other.join().unwrap();
            assert!(matches!(refused, Err(Error::Poisoned { .. })));
        }
    });
}

#[test]
fn a_waiter_that_wants_other_values_than_the_next_leader_is_refused() {
    explore(Bound::None, || {
        let registry = shared();
        let first = lead(&registry, &request(0, 1));
        let other = spawn(&registry, |registry| blocking(registry, request(1, 1)));
        assert!(registry.fail(first, "boom"));
        // Thread 2 takes over before or after thread 1 has looked.
        let second = blocking(&registry, request(2, 2));
        match (other.join().unwrap(), second) {
            (Err(Error::SpecMismatch { .. }), Ok(Step::Lead(ticket)))
            | (Ok(Step::Lead(ticket)), Err(Error::SpecMismatch { .. })) => {
                publish(&registry, ticket);
            }
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn a_thread_that_looked_before_the_publish_does_not_make_it_twice() {
    explore(Bound::Preemptions { full: 6, short: 3 }, || {
        let (registry, object) = (shared(), Guarded::default());
        let live = Arc::new(AtomicUsize::new(0));
        let made = Arc::new(AtomicUsize::new(0));
        let ask = |thread| {
            let (live, made, object) = (live.clone(), made.clone(), object.clone());
            move |registry: &Registry| {
                let observe = || match live.load(SeqCst) {
                    0 => Observed::Absent,
                    identity => Observed::Present(identity as u64),
                };
                match acquire(registry, request(thread, 1), observe) {
                    Ok(Step::Lead(ticket)) => {
                        object.change();
                        made.fetch_add(1, SeqCst);
                        live.store(7, SeqCst);
                        publish(registry, ticket);
                    }
                    Ok(Step::Join { generation: 1 }) => object.read(),
                    // The leader's object is visible before it is published; it leads until then.
                    other => panic!("{other:?}"),
                }
            }
        };
        let others = [spawn(&registry, ask(1)), spawn(&registry, ask(2))];
        ask(0)(&registry);
        all(others);
        assert_eq!(made.load(SeqCst), 1);
        assert_eq!(count(&registry, Decision::OutOfBand), 0);
    });
}

#[test]
fn changes_of_another_key_end_no_wait() {
    explore(Bound::None, || {
        let registry = shared();
        let key = groups("a");
        let first = lead(&registry, &request(0, 1));
        let done = Arc::new(AtomicBool::new(false));
        let published = done.clone();
        let waiter = spawn(&registry, move |registry| {
            let step = blocking(registry, request(1, 1));
            assert_eq!(step, Ok(Step::Join { generation: 1 }));
            assert!(published.load(SeqCst));
        });
        let ticket = lead(&registry, &request_for(0, &key));
        assert!(registry.fail(ticket, "boom"));
        done.store(true, SeqCst);
        let published = registry.publish(first, spec(1), Origin::Created, 7);
        assert_eq!(published, Ok(1));
        waiter.join().unwrap();
    });
}
