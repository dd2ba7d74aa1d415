//! The line in front of a phase: first come, first served, unless that would deadlock.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;

use distguard_core::enter::Entry;
use distguard_core::key::Key;
use distguard_core::phases::{Phase, VisitId};
use distguard_core::registry::{Registry, Step};

use crate::common::{enter, groups, in_line, inside, is_wait, lead, request, request_for, FOREVER};
use crate::explore::{all, blocking, explore, publish, shared, spawn, Bound, Guarded};

const W: Key = Key::World;

/// Goes on waiting with a visit that is in line.
fn wait_in_line(registry: &Registry, visit: VisitId) {
    loop {
        match registry.try_enter(visit).unwrap() {
            Entry::Inside => return,
            Entry::Wait { epoch, .. } => registry.wait_to_enter(visit, epoch, FOREVER),
        }
    }
}

#[test]
fn a_forward_does_not_overtake_a_capture_that_came_before_it() {
    explore(Bound::Preemptions { full: 6, short: 3 }, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let first = inside(&registry, Phase::Forward, 0);
        let capture = in_line(&registry, Phase::Capture, 1);
        let captured = Arc::new(AtomicBool::new(false));
        let capturing = spawn(&registry, {
            let (captured, guarded) = (captured.clone(), guarded.clone());
            move |registry| {
                wait_in_line(registry, capture);
                guarded.change();
                captured.store(true, SeqCst);
                assert!(registry.leave(capture));
            }
        });
        let later = spawn(&registry, move |registry| {
            let visit = enter(registry, Phase::Forward, 2).unwrap();
            assert!(captured.load(SeqCst));
            guarded.read();
            assert!(registry.leave(visit));
        });
        assert!(registry.leave(first));
        capturing.join().unwrap();
        later.join().unwrap();
    });
}

#[test]
fn captures_go_in_by_arrival() {
    explore(Bound::None, || {
        let registry = shared();
        let first = inside(&registry, Phase::Capture, 0);
        let line = [1, 2].map(|thread| in_line(&registry, Phase::Capture, thread));
        let one_was_in = Arc::new(AtomicBool::new(false));
        let one = spawn(&registry, {
            let one_was_in = one_was_in.clone();
            move |registry| {
                wait_in_line(registry, line[0]);
                one_was_in.store(true, SeqCst);
                assert!(registry.leave(line[0]));
            }
        });
        let two = spawn(&registry, move |registry| {
            wait_in_line(registry, line[1]);
            assert!(one_was_in.load(SeqCst));
            assert!(registry.leave(line[1]));
        });
        assert!(registry.leave(first));
        one.join().unwrap();
        two.join().unwrap();
    });
}

/// Thread 0 is in a forward and will ask for the world. Thread 1 is in line for a capture. Thread 2
/// makes the world, for which it needs a forward. Behind the capture in line it would deadlock.
#[test]
fn a_thread_that_is_waited_for_overtakes_also_when_the_wait_begins_after_it_fell_asleep() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let forward = inside(&registry, Phase::Forward, 0);
        let capture = in_line(&registry, Phase::Capture, 1);
        let ticket = lead(&registry, &request(2, 1));
        let capturing = spawn(&registry, {
            let guarded = guarded.clone();
            move |registry| {
                wait_in_line(registry, capture);
                guarded.change();
                assert!(registry.leave(capture));
            }
        });
        let making = spawn(&registry, {
            let guarded = guarded.clone();
            move |registry| {
                let visit = enter(registry, Phase::Forward, 2).unwrap();
                guarded.read();
                assert!(registry.leave(visit));
                publish(registry, ticket);
            }
        });
        let step = blocking(&registry, request(0, 1));
        assert_eq!(step, Ok(Step::Join { generation: 1 }));
        guarded.read();
        assert!(registry.leave(forward));
        making.join().unwrap();
        capturing.join().unwrap();
    });
}

/// As above, but no thread waits with the capture: two threads, every interleaving.
#[test]
fn the_beginning_of_a_wait_wakes_a_thread_that_may_overtake_now() {
    explore(Bound::None, || {
        let registry = shared();
        let forward = inside(&registry, Phase::Forward, 0);
        let capture = in_line(&registry, Phase::Capture, 1);
        let ticket = lead(&registry, &request(2, 1));
        let making = spawn(&registry, move |registry| {
            let visit = enter(registry, Phase::Load, 2).unwrap();
            assert!(registry.leave(visit));
            publish(registry, ticket);
        });
        let step = blocking(&registry, request(0, 1));
        assert_eq!(step, Ok(Step::Join { generation: 1 }));
        making.join().unwrap();
        assert!(registry.leave(forward));
        assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    });
}

/// The chain has one more link: thread 0 waits for thread 3's key, and thread 3 for thread 2.
#[test]
fn a_thread_that_is_waited_for_through_others_overtakes_too() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let registry = shared();
        let key = groups("a");
        let forward = inside(&registry, Phase::Forward, 0);
        let capture = in_line(&registry, Phase::Capture, 1);
        let world = lead(&registry, &request(2, 1));
        let of_key = lead(&registry, &request_for(3, &key));
        let making = spawn(&registry, move |registry| {
            let visit = enter(registry, Phase::Forward, 2).unwrap();
            assert!(registry.leave(visit));
            publish(registry, world);
        });
        let between = spawn(&registry, move |registry| {
            let step = blocking(registry, request(3, 1));
            assert_eq!(step, Ok(Step::Join { generation: 1 }));
            publish(registry, of_key);
        });
        let step = blocking(&registry, request_for(0, &key));
        assert_eq!(step, Ok(Step::Join { generation: 1 }));
        making.join().unwrap();
        between.join().unwrap();
        assert!(registry.leave(forward));
        assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    });
}

/// Otherwise two of them would wake each other for as long as any visit is in line.
#[test]
fn the_beginning_of_a_wait_for_a_key_does_not_wake_other_waiters_for_it() {
    explore(Bound::None, || {
        let registry = shared();
        let _forward = inside(&registry, Phase::Forward, 0);
        let _capture = in_line(&registry, Phase::Capture, 9);
        let ticket = lead(&registry, &request(0, 1));
        let waiter = |thread| {
            move |registry: &Registry| {
                let Ok(Step::Wait { epoch, .. }) = registry.try_acquire(&request(thread, 1)) else {
                    return;
                };
                registry.wait(&request(thread, 1), epoch, FOREVER);
                assert!(registry.is_ready(&W));
            }
        };
        let others = [spawn(&registry, waiter(1)), spawn(&registry, waiter(2))];
        publish(&registry, ticket);
        all(others);
        assert!(!is_wait(&registry.try_acquire(&request(0, 1))));
    });
}
