//! The phase lock: which phases exclude each other, and that no thread is left waiting.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::Arc;

use distguard_core::enter::Entry;
use distguard_core::error::Error;
use distguard_core::phases::{Access, Phase, RunnerId};
use distguard_core::registry::Registry;

use crate::common::{actor, enter, in_line, inside};
use crate::explore::{all, explore, shared, spawn, Bound, Guarded};

/// Visits a phase; a capture changes the data that the other phases read.
fn visit(phase: Phase, thread: u64, guarded: &Guarded) -> impl FnOnce(&Registry) + 'static {
    let guarded = guarded.clone();
    move |registry| {
        let visit = enter(registry, phase, thread).unwrap();
        match phase {
            Phase::Capture => guarded.change(),
            Phase::Forward | Phase::Load => guarded.read(),
        }
        assert!(registry.leave(visit));
    }
}

#[test]
fn a_capture_and_a_forward_are_never_inside_together() {
    explore(Bound::None, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let other = spawn(&registry, visit(Phase::Capture, 1, &guarded));
        visit(Phase::Forward, 0, &guarded)(&registry);
        other.join().unwrap();
        assert!(registry.snapshot().visits.is_empty());
    });
}

/// A step of `runner`, which is a draft of `target` if there is one; a load changes the data that
/// the other phases read.
fn step(
    phase: Phase,
    runner: u64,
    target: Option<u64>,
    thread: u64,
    guarded: &Guarded,
) -> impl FnOnce(&Registry) + 'static {
    let guarded = guarded.clone();
    let access = Access {
        phase,
        runner: Some(RunnerId(runner)),
        target: target.map(RunnerId),
    };
    move |registry| {
        let visit = enter(registry, access, thread).unwrap();
        match phase {
            Phase::Load => guarded.change(),
            Phase::Forward | Phase::Capture => guarded.read(),
        }
        assert!(registry.leave(visit));
    }
}

#[test]
fn a_load_and_forwards_of_its_runner_and_its_draft_are_never_inside_together() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let forward = step(Phase::Forward, 1, None, 1, &guarded);
        let draft = step(Phase::Forward, 2, Some(1), 2, &guarded);
        let others = [spawn(&registry, forward), spawn(&registry, draft)];
        step(Phase::Load, 1, None, 0, &guarded)(&registry);
        all(others);
        assert!(registry.snapshot().visits.is_empty());
    });
}

#[test]
fn three_threads_with_captures_in_between_all_get_in() {
    for phases in [
        [Phase::Capture, Phase::Capture, Phase::Capture],
        [Phase::Capture, Phase::Forward, Phase::Load],
        [Phase::Forward, Phase::Capture, Phase::Capture],
    ] {
        explore(Bound::Preemptions { full: 5, short: 3 }, move || {
            let (registry, guarded) = (shared(), Guarded::default());
            let others = [1, 2].map(|it| spawn(&registry, visit(phases[it], it as u64, &guarded)));
            visit(phases[0], 0, &guarded)(&registry);
            all(others);
            assert!(registry.snapshot().visits.is_empty());
        });
    }
}

#[test]
fn loads_and_forwards_overlap_and_never_wait() {
    let overlapped = Arc::new(AtomicBool::new(false));
    let seen = overlapped.clone();
    explore(Bound::None, move || {
        let registry = shared();
        let seen = seen.clone();
        let other = spawn(&registry, move |registry| {
            let forward = inside(registry, Phase::Forward, 1);
            let visits = registry.snapshot().visits;
            assert!(visits.iter().all(|visit| visit.inside));
            if visits.len() == 2 {
                seen.store(true, SeqCst);
            }
            assert!(registry.leave(forward));
        });
        let load = inside(&registry, Phase::Load, 0);
        assert!(registry.leave(load));
        other.join().unwrap();
    });
    assert!(overlapped.load(SeqCst));
}

#[test]
fn a_thread_does_not_wait_for_itself_even_with_others_in_line() {
    explore(Bound::Preemptions { full: 4, short: 3 }, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let capture = inside(&registry, Phase::Capture, 0);
        let others = [
            spawn(&registry, visit(Phase::Forward, 1, &guarded)),
            spawn(&registry, visit(Phase::Capture, 2, &guarded)),
        ];
        let forward = inside(&registry, Phase::Forward, 0);
        guarded.change();
        assert!(registry.leave(forward));
        assert!(registry.leave(capture));
        all(others);
    });
}

#[test]
fn a_forward_that_becomes_a_capture_overtakes_a_capture_that_waits_for_it() {
    explore(Bound::None, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let forward = inside(&registry, Phase::Forward, 0);
        let other = spawn(&registry, visit(Phase::Capture, 1, &guarded));
        let capture = inside(&registry, Phase::Capture, 0);
        guarded.change();
        assert!(registry.leave(capture));
        guarded.change();
        assert!(registry.leave(forward));
        other.join().unwrap();
    });
}

#[test]
fn of_two_threads_in_forward_that_both_want_to_capture_one_is_refused() {
    explore(Bound::None, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let upgrade = |thread| {
            let forward = inside(&registry, Phase::Forward, thread);
            let guarded = guarded.clone();
            move |registry: &Registry| {
                let captured = enter(registry, Phase::Capture, thread);
                let refused = match captured {
                    Ok(capture) => {
                        guarded.change();
                        assert!(registry.leave(capture));
                        0
                    }
                    Err(Error::Deadlock { cycle }) => {
                        guarded.read();
                        assert_eq!(cycle.len(), 2);
                        assert_eq!(cycle[0].thread, actor(thread).thread);
                        1
                    }
                    Err(other) => panic!("{other}"),
                };
                assert!(registry.leave(forward));
                refused
            }
        };
        let (own, other) = (upgrade(0), upgrade(1));
        let other = spawn(&registry, other);
        let refused = own(&registry) + other.join().unwrap();
        assert_eq!(refused, 1);
        assert!(registry.snapshot().visits.is_empty());
    });
}

#[test]
fn a_waiter_that_times_out_in_line_lets_the_next_one_enter() {
    explore(Bound::None, || {
        let (registry, guarded) = (shared(), Guarded::default());
        let _forward = inside(&registry, Phase::Forward, 0);
        let capture = in_line(&registry, Phase::Capture, 1);
        let other = spawn(&registry, visit(Phase::Forward, 2, &guarded));
        let timed_out = registry.phase_timed_out(capture, crate::common::FOREVER);
        assert!(matches!(timed_out, Error::PhaseTimeout { .. }));
        // The first forward is still inside: only the line was in the way.
        other.join().unwrap();
    });
}

#[test]
fn a_visit_that_another_thread_ends_does_not_sleep_on() {
    explore(Bound::None, || {
        let registry = shared();
        let _forward = inside(&registry, Phase::Forward, 0);
        let (visit, entry) = registry.arrive(Phase::Capture, &actor(1)).unwrap();
        let other = spawn(&registry, move |registry| {
            let mut entry = Ok(entry);
            while let Ok(Entry::Wait { epoch, .. }) = entry {
                registry.wait_to_enter(visit, epoch, crate::common::FOREVER);
                entry = registry.try_enter(visit);
            }
            assert_eq!(entry, Err(Error::VisitOver));
        });
        assert!(registry.leave(visit));
        other.join().unwrap();
    });
}
