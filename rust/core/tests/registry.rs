//! The registry under real threads. Barriers, channels and the registry's own snapshots give the
//! order; no thread sleeps to let another thread go first.

mod common;

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use common::*;
use distguard_core::clock::{Clock, ManualClock};
use distguard_core::error::Error;
use distguard_core::guard::LeadGuard;
use distguard_core::key::Key;
use distguard_core::policy::Decision;
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Purpose};
use distguard_core::snapshot::SlotState;

const W: Key = Key::World;
const THREADS: u64 = 8;

fn blocking(registry: &Registry, request: Request) -> Result<Step, Error> {
    acquire(registry, request, || Observed::Unknown)
}

fn waiters(registry: &Registry, key: &Key) -> usize {
    registry.snapshot().slot(key).map_or(0, |it| it.waiters)
}

fn count(registry: &Registry, decision: Decision) -> usize {
    let decisions = decisions(registry);
    decisions.iter().filter(|it| **it == decision).count()
}

#[test]
fn of_many_equal_callers_one_leads_and_all_others_join() {
    for _ in 0..50 {
        let registry = registry();
        let start = Barrier::new(usize::try_from(THREADS).unwrap());
        let joined = AtomicUsize::new(0);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                let (registry, start, joined) = (&registry, &start, &joined);
                scope.spawn(move || {
                    start.wait();
                    match blocking(registry, request(thread, 1)).unwrap() {
                        Step::Lead(ticket) => {
                            let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
                        }
                        Step::Join { generation: 1 } => {
                            joined.fetch_add(1, Ordering::Relaxed);
                        }
                        other => panic!("{other:?}"),
                    }
                });
            }
        });
        assert_eq!(joined.into_inner() as u64, THREADS - 1);
        assert_eq!(count(&registry, Decision::Lead), 1);
    }
}

#[test]
fn every_waiter_is_woken_by_the_publish() {
    let registry = registry();
    let ticket = lead(&registry, &request(0, 1));
    thread::scope(|scope| {
        for thread in 1..THREADS {
            let registry = &registry;
            scope.spawn(move || {
                let step = blocking(registry, request(thread, 1)).unwrap();
                assert_eq!(step, Step::Join { generation: 1 });
            });
        }
        until(|| waiters(&registry, &W) as u64 == THREADS - 1);
        let waiting = slot(&registry, &W).waiting;
        assert!((1..THREADS).map(actor).eq(waiting));
        let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
    });
    assert_eq!(waiters(&registry, &W), 0);
}

#[test]
fn a_failing_leader_hands_over_to_exactly_one_waiter() {
    let registry = registry();
    let first = lead(&registry, &request(0, 1));
    let leading = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 1..THREADS {
            let (registry, leading) = (&registry, &leading);
            scope.spawn(move || {
                let Ok(Step::Lead(ticket)) = blocking(registry, request(thread, 1)) else {
                    return;
                };
                assert_eq!(leading.fetch_add(1, Ordering::SeqCst), 0);
                let failed = slot(registry, &W).failures;
                // All other threads wait for this thread again before it ends its lead.
                until(|| waiters(registry, &W) as u64 == THREADS - 1 - failed);
                leading.fetch_sub(1, Ordering::SeqCst);
                if failed < 3 {
                    registry.fail(ticket, "boom");
                } else {
                    let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
                }
            });
        }
        until(|| waiters(&registry, &W) as u64 == THREADS - 1);
        registry.fail(first, "boom");
    });
    assert_eq!(count(&registry, Decision::Lead), 4);
    assert_eq!(count(&registry, Decision::Fail), 3);
    assert_eq!(count(&registry, Decision::Join) as u64, THREADS - 4);
}

#[test]
fn an_unequal_caller_is_refused_without_waiting_for_the_leader() {
    let registry = registry();
    let ticket = lead(&registry, &request(0, 1));
    thread::scope(|scope| {
        let refused = scope.spawn(|| blocking(&registry, request(1, 2)));
        let refused = refused.join().unwrap();
        assert!(matches!(refused, Err(Error::SpecMismatch { .. })));
    });
    assert_eq!(registry.publish(ticket, spec(1), Origin::Created, 7), Ok(1));
}

#[test]
fn a_leader_that_panics_hands_over() {
    let registry = registry();
    let started = Barrier::new(2);
    thread::scope(|scope| {
        let dying = scope.spawn(|| {
            let ticket = lead(&registry, &request(0, 1));
            let _guard = LeadGuard::new(&registry, ticket);
            started.wait();
            until(|| waiters(&registry, &W) == 1);
            // Unwinds without the noise of panic!.
            resume_unwind(Box::new("the initialiser panicked"));
        });
        started.wait();
        let step = blocking(&registry, request(1, 1)).unwrap();
        assert!(dying.join().is_err());
        let Step::Lead(ticket) = step else {
            panic!("{step:?}");
        };
        let reason = slot(&registry, &W).last_failure;
        assert_eq!(reason.as_deref(), Some("the leader panicked"));
        let guard = LeadGuard::new(&registry, ticket);
        assert_eq!(guard.publish(spec(1), Origin::Created, 7), Ok(1));
    });
    assert!(registry.is_ready(&W));
}

#[test]
fn a_guard_resolves_its_ticket_once_and_fails_it_when_dropped() {
    let registry = registry();
    let guard = || LeadGuard::new(&registry, lead(&registry, &request(0, 1)));
    drop(guard());
    assert!(guard().fail("boom"));
    assert!(guard().poison("half"));
    assert_eq!(count(&registry, Decision::Fail), 2);
    assert_eq!(registry.reset(&actor(0), false), Ok(()));
    let _ = guard().publish(spec(1), Origin::Created, 7);
    let ticket = begin_teardown(&registry, &W, 0, false);
    assert!(LeadGuard::new(&registry, ticket).end_teardown());
    assert_eq!(slot(&registry, &W).state, SlotState::Idle);
}

#[test]
fn two_threads_that_want_each_others_keys_do_not_both_wait() {
    let (a, b) = (groups("a"), groups("b"));
    for _ in 0..50 {
        let registry = registry();
        let both_lead = Barrier::new(2);
        let cross = |thread, own: &Key, other: &Key| {
            let guard = LeadGuard::new(&registry, lead(&registry, &request_for(thread, own)));
            both_lead.wait();
            // A thread that is refused drops its guard, which lets the other one go on.
            let step = blocking(&registry, request_for(thread, other));
            drop(guard);
            match step {
                Ok(Step::Lead(ticket)) => {
                    registry.fail(ticket, "done");
                    None
                }
                Err(Error::Deadlock { cycle }) => Some(cycle),
                other => panic!("{other:?}"),
            }
        };
        let outcomes = thread::scope(|scope| {
            let one = scope.spawn(|| cross(1, &a, &b));
            let two = scope.spawn(|| cross(2, &b, &a));
            [one.join().unwrap(), two.join().unwrap()]
        });
        let [cycle] = outcomes
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let mut named: Vec<_> = cycle
            .iter()
            .map(|it| (it.thread.0, it.subject.clone()))
            .collect();
        named.sort();
        assert_eq!(named, [(1, (&b).into()), (2, (&a).into())]);
    }
}

#[test]
fn a_wait_that_would_close_a_cycle_does_not_sleep() {
    let registry = registry();
    let (a, b) = (groups("a"), groups("b"));
    let a_ticket = lead(&registry, &request_for(1, &a));
    let _b_ticket = lead(&registry, &request_for(2, &b));
    let wants_b = request_for(1, &b);
    // Told to wait before the other thread waits: only `wait` itself can notice the cycle.
    let Ok(Step::Wait { epoch, .. }) = registry.try_acquire(&wants_b) else {
        panic!("should wait");
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            let step = blocking(&registry, request_for(2, &a));
            assert!(matches!(step, Ok(Step::Lead(_))));
        });
        until(|| waiters(&registry, &a) == 1);
        registry.wait(&wants_b, epoch, FOREVER);
        // The other thread's slices may pass while this one asks.
        let refused = loop {
            match registry.try_acquire(&wants_b) {
                Ok(Step::Wait { .. }) => thread::yield_now(),
                step => break step,
            }
        };
        assert!(matches!(refused, Err(Error::Deadlock { .. })));
        registry.fail(a_ticket, "refused");
    });
}

#[test]
fn a_deadline_that_has_passed_names_the_leader_and_for_how_long_it_leads() {
    let clock = Arc::new(ManualClock::new());
    let registry = Registry::new(clock.clone());
    let ticket = lead(&registry, &request(0, 1));
    clock.advance(Duration::from_secs(13));
    let waited = Duration::from_secs(3);
    let late = Request {
        waited,
        ..request(1, 1)
    };
    let Error::Timeout {
        owner: Some(owner),
        waited: said,
        ..
    } = registry.timed_out(&late)
    else {
        panic!("a thread leads");
    };
    assert_eq!(
        (owner.leader, owner.purpose),
        (actor(0), Some(Purpose::Build))
    );
    assert_eq!((owner.age, said), (Duration::from_secs(13), waited));
    let event = registry.snapshot().events.pop().unwrap();
    assert_eq!((event.decision, event.waited), (Decision::Timeout, waited));
    registry.fail(ticket, "done");
    let free = registry.timed_out(&late);
    assert!(matches!(free, Error::Timeout { owner: None, .. }));
}

#[test]
fn a_slow_leader_is_recorded_once_per_lead() {
    let clock = Arc::new(ManualClock::new());
    let registry = Registry::new(clock.clone());
    let patient = |thread| Request {
        slow_after: Duration::from_secs(30),
        ..request(thread, 1)
    };
    let slow = |thread| {
        let before = count(&registry, Decision::Slow);
        assert!(is_wait(&registry.try_acquire(&patient(thread))));
        count(&registry, Decision::Slow) > before
    };
    for _ in 0..2 {
        let ticket = lead(&registry, &patient(0));
        clock.advance(Duration::from_secs(29));
        assert!(!slow(1) && !slow(2));
        clock.advance(Duration::from_secs(1));
        assert!(slow(2));
        assert!(!slow(2) && !slow(1));
        registry.fail(ticket, "done");
    }
    assert_eq!(count(&registry, Decision::Slow), 2);
}

#[test]
fn late_observers_never_make_state_twice() {
    for _ in 0..200 {
        let registry = registry();
        let live = AtomicUsize::new(0);
        let made = AtomicUsize::new(0);
        let start = Barrier::new(4);
        thread::scope(|scope| {
            for thread in 0..4 {
                let (registry, live, made, start) = (&registry, &live, &made, &start);
                scope.spawn(move || {
                    let observe = || match live.load(Ordering::SeqCst) {
                        0 => Observed::Absent,
                        identity => Observed::Present(identity as u64),
                    };
                    start.wait();
                    let request = request(thread, 1);
                    match acquire(registry, request, observe) {
                        Ok(Step::Lead(ticket)) => {
                            made.fetch_add(1, Ordering::SeqCst);
                            live.store(7, Ordering::SeqCst);
                            let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
                        }
                        Ok(Step::Join { generation: 1 }) => {}
                        other => panic!("{other:?}"),
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
        assert_eq!(count(&registry, Decision::OutOfBand), 0);
    }
}

#[test]
fn leases_and_teardowns_of_many_threads_never_overlap() {
    let registry = registry();
    let (holders, live) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for thread in 0..4 {
            let (registry, holders, live) = (&registry, &holders, &live);
            scope.spawn(move || {
                for _ in 0..200 {
                    match blocking(registry, request(thread, 1)).unwrap() {
                        Step::Lead(ticket) => {
                            assert!(!live.swap(true, Ordering::SeqCst));
                            let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
                        }
                        Step::Join { generation } => {
                            let joined = [(W, generation)];
                            let Ok(leases) = registry.lease_at(&joined, "a", &actor(thread)) else {
                                continue;
                            };
                            holders.fetch_add(1, Ordering::SeqCst);
                            assert!(live.load(Ordering::SeqCst));
                            holders.fetch_sub(1, Ordering::SeqCst);
                            assert!(registry.release(leases[0]));
                        }
                        other => panic!("{other:?}"),
                    }
                    let begun = registry.begin_teardown(&W, &actor(thread), false);
                    if let Ok(distguard_core::teardown::Teardown::Begun { ticket, .. }) = begun {
                        assert_eq!(holders.load(Ordering::SeqCst), 0);
                        assert!(live.swap(false, Ordering::SeqCst));
                        assert!(registry.end_teardown(ticket));
                    }
                }
            });
        }
    });
}

/// Panics, once told to, while the registry is locked.
struct BrokenClock(AtomicBool);

impl Clock for BrokenClock {
    fn now(&self) -> Duration {
        if self.0.swap(false, Ordering::SeqCst) {
            resume_unwind(Box::new("the clock broke"));
        }
        Duration::ZERO
    }
}

#[test]
fn a_panic_under_the_lock_does_not_wedge_the_other_threads() {
    let clock = Arc::new(BrokenClock(AtomicBool::new(false)));
    let registry = Registry::new(clock.clone());
    let ticket = lead(&registry, &request(0, 1));
    clock.0.store(true, Ordering::SeqCst);
    let panicked = catch_unwind(AssertUnwindSafe(|| registry.try_acquire(&request(1, 1))));
    assert!(panicked.is_err());
    assert_eq!(registry.publish(ticket, spec(1), Origin::Created, 7), Ok(1));
    let step = blocking(&registry, request(1, 1));
    assert_eq!(step, Ok(Step::Join { generation: 1 }));
}
