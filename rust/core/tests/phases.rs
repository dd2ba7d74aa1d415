//! The phase lock: which visit enters, which waits, what is recorded. The registry's own snapshots
//! give the order; no thread sleeps to let another thread go first.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::*;
use distguard_core::actor::ThreadId;
use distguard_core::clock::ManualClock;
use distguard_core::enter::Entry;
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::phases::{Access, Phase, RunnerId, VisitId};
use distguard_core::policy::Decision;
use distguard_core::registry::{Registry, Step};
use distguard_core::slot::Origin;

const W: Key = Key::World;

/// Thread, phase and whether it is inside, by arrival.
fn visits(registry: &Registry) -> Vec<(u64, Phase, bool)> {
    let snapshot = registry.snapshot();
    let visits = snapshot.visits.iter();
    visits
        .map(|it| (it.actor.thread.0, it.access.phase, it.inside))
        .collect()
}

/// The threads that are inside and in the way.
fn in_the_way(registry: &Registry, visit: VisitId) -> Vec<u64> {
    match registry.try_enter(visit) {
        Ok(Entry::Wait { inside, .. }) => inside.iter().map(|it| it.thread.0).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn loads_and_forwards_overlap_and_a_capture_is_alone() {
    let registry = registry();
    let load = inside(&registry, Phase::Load, 1);
    let forward = inside(&registry, Phase::Forward, 2);
    let capture = in_line(&registry, Phase::Capture, 3);
    assert_eq!(in_the_way(&registry, capture), [1, 2]);
    assert!(registry.leave(load));
    assert_eq!(in_the_way(&registry, capture), [2]);
    assert!(registry.leave(forward));
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    let second = in_line(&registry, Phase::Capture, 1);
    assert_eq!(in_the_way(&registry, second), [3]);
}

/// The access for `phase` of `runner`, which is a draft of `target` if there is one.
fn access(phase: Phase, runner: u64, target: Option<u64>) -> Access {
    Access {
        phase,
        runner: Some(RunnerId(runner)),
        target: target.map(RunnerId),
    }
}

#[test]
fn a_load_waits_for_forwards_of_its_runner_and_of_its_drafts_and_keeps_later_ones_out() {
    let registry = registry();
    let forward = inside(&registry, access(Phase::Forward, 1, None), 1);
    let draft = inside(&registry, access(Phase::Forward, 2, Some(1)), 2);
    let load = in_line(&registry, access(Phase::Load, 1, None), 3);
    assert_eq!(in_the_way(&registry, load), [1, 2]);
    let later = in_line(&registry, access(Phase::Forward, 1, None), 4);
    let other = inside(&registry, access(Phase::Forward, 3, None), 5);
    assert!(registry.leave(forward));
    assert!(registry.leave(draft));
    assert_eq!(registry.try_enter(load), Ok(Entry::Inside));
    assert_eq!(in_the_way(&registry, later), [3]);
    let about = registry.inside_of(RunnerId(1), ThreadId(9));
    assert_eq!(about.len(), 1);
    assert!(registry.leave(load));
    assert_eq!(registry.try_enter(later), Ok(Entry::Inside));
    assert!(registry.leave(other));
}

#[test]
fn two_threads_that_each_run_one_runner_and_load_the_other_are_refused_as_a_cycle() {
    let registry = registry();
    inside(&registry, access(Phase::Forward, 1, None), 1);
    inside(&registry, access(Phase::Forward, 2, None), 2);
    in_line(&registry, access(Phase::Load, 2, None), 1);
    let second = registry.arrive(access(Phase::Load, 1, None), &actor(2));
    assert!(matches!(second, Err(Error::Deadlock { .. })), "{second:?}");
}

#[test]
fn a_visit_that_comes_after_a_capture_in_line_stays_behind_it() {
    let registry = registry();
    let forward = inside(&registry, Phase::Forward, 1);
    let capture = in_line(&registry, Phase::Capture, 2);
    let later = in_line(&registry, Phase::Forward, 3);
    // No visit inside is in its way; only the line is.
    assert!(in_the_way(&registry, later).is_empty());
    assert!(registry.leave(forward));
    assert!(in_the_way(&registry, later).is_empty());
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    assert_eq!(in_the_way(&registry, later), [2]);
    assert!(registry.leave(capture));
    assert_eq!(registry.try_enter(later), Ok(Entry::Inside));
}

#[test]
fn a_thread_is_never_in_its_own_way() {
    let registry = registry();
    let capture = inside(&registry, Phase::Capture, 1);
    let waiting = in_line(&registry, Phase::Capture, 2);
    let forward = inside(&registry, Phase::Forward, 1);
    let again = inside(&registry, Phase::Capture, 1);
    assert_eq!(visits(&registry).iter().filter(|it| it.2).count(), 3);
    for visit in [again, forward, capture] {
        assert_eq!(in_the_way(&registry, waiting)[0], 1);
        assert!(registry.leave(visit));
    }
    assert_eq!(registry.try_enter(waiting), Ok(Entry::Inside));
}

#[test]
fn a_thread_that_is_waited_for_overtakes_the_thread_that_waits_for_it() {
    let registry = registry();
    let forward = inside(&registry, Phase::Forward, 1);
    let capture = in_line(&registry, Phase::Capture, 2);
    // Thread 2 waits for thread 1, so thread 1 does not wait behind thread 2.
    let nested = inside(&registry, Phase::Load, 1);
    assert!(registry.leave(nested));
    assert!(registry.leave(forward));
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
}

#[test]
fn of_two_in_forward_that_want_to_capture_the_second_is_refused_and_named_with_the_first() {
    let registry = registry();
    let forwards = [1, 2].map(|thread| inside(&registry, Phase::Forward, thread));
    let capture = in_line(&registry, Phase::Capture, 1);
    let Err(Error::Deadlock { cycle }) = registry.arrive(Phase::Capture, &actor(2)) else {
        panic!("both would wait");
    };
    let named: Vec<_> = cycle
        .iter()
        .map(|it| (it.thread.0, it.subject.clone()))
        .collect();
    let phase = || (&Phase::Capture).into();
    assert_eq!(named, [(2, phase()), (1, phase())]);
    // The refused visit has ended; the forward around it has not.
    let (f, c) = (Phase::Forward, Phase::Capture);
    assert_eq!(
        visits(&registry),
        [(1, f, true), (2, f, true), (1, c, false)]
    );
    assert!(registry.leave(forwards[1]));
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
}

#[test]
fn a_cycle_over_a_phase_and_a_key_is_refused_by_the_key_too() {
    let registry = registry();
    let _forward = inside(&registry, Phase::Forward, 1);
    let _ticket = lead(&registry, &request(2, 1));
    let _capture = in_line(&registry, Phase::Capture, 2);
    let Err(Error::Deadlock { cycle }) = registry.try_acquire(&request(1, 1)) else {
        panic!("both would wait");
    };
    let subjects: Vec<_> = cycle.iter().map(|it| it.subject.to_string()).collect();
    assert_eq!(subjects, ["world", "phase:capture"]);
    // Another thread may wait, because no thread waits for it.
    assert!(is_wait(&registry.try_acquire(&request(3, 1))));
}

#[test]
fn a_visit_ends_once_and_cannot_be_continued() {
    let registry = registry();
    let visit = inside(&registry, Phase::Load, 1);
    assert_eq!(registry.try_enter(visit), Ok(Entry::Inside));
    assert!(registry.leave(visit));
    assert!(!registry.leave(visit));
    assert_eq!(registry.try_enter(visit), Err(Error::VisitOver));
    assert_eq!(
        registry.phase_timed_out(visit, FOREVER),
        Error::VisitOver,
        "nothing is recorded about it"
    );
    assert!(decisions(&registry).is_empty());
    // Would sleep forever if there were anything to wait for.
    registry.wait_to_enter(visit, u64::MAX, FOREVER);
}

#[test]
fn a_visit_made_before_a_fork_is_over_after_it() {
    let visit = inside(&registry(), Phase::Load, 1);
    let child = Registry::with_instance(Arc::new(ManualClock::new()), 4711);
    let own = inside(&child, Phase::Load, 1);
    assert_eq!(child.try_enter(visit), Err(Error::VisitOver));
    assert!(!child.leave(visit));
    assert!(child.leave(own));
}

#[test]
fn a_deadline_that_has_passed_in_line_names_the_threads_in_the_way() {
    let registry = registry();
    let waited = Duration::from_secs(3);
    let forward = inside(&registry, Phase::Forward, 1);
    let capture = in_line(&registry, Phase::Capture, 2);
    let behind = in_line(&registry, Phase::Load, 3);
    let timed_out = registry.phase_timed_out(behind, waited);
    let only_the_line = Error::PhaseTimeout {
        access: Phase::Load.into(),
        inside: vec![],
        waited,
    };
    assert_eq!(timed_out, only_the_line);
    let timed_out = registry.phase_timed_out(capture, waited);
    let behind_forward = Error::PhaseTimeout {
        access: Phase::Capture.into(),
        inside: vec![actor(1)],
        waited,
    };
    assert_eq!(timed_out, behind_forward);
    assert!(timed_out.to_string().contains("occupied by thread t1"));
    assert_eq!(visits(&registry), [(1, Phase::Forward, true)]);
    let event = registry.snapshot().events.pop().unwrap();
    assert_eq!((event.decision, event.waited), (Decision::Timeout, waited));
    assert_eq!(event.subject, (&Phase::Capture).into());
    assert!(registry.leave(forward));
}

#[test]
fn only_waits_and_refusals_are_recorded_with_the_threads_that_are_waited_for() {
    let registry = registry();
    let _load = inside(&registry, Phase::Forward, 1);
    let capture = in_line(&registry, Phase::Capture, 2);
    let _behind = in_line(&registry, Phase::Load, 3);
    // Asking again is not recorded.
    let _ = registry.try_enter(capture);
    let events = registry.snapshot().events;
    let recorded: Vec<_> = events
        .iter()
        .map(|it| (it.decision, it.actor.thread.0, it.detail.as_str()))
        .collect();
    let expected = [
        (Decision::Wait, 2, "for thread t1"),
        (Decision::Wait, 3, "in line"),
    ];
    assert_eq!(recorded, expected);
    assert_eq!(events[0].subject, (&Phase::Capture).into());
    assert_eq!(events[0].generation, 0);
}

#[test]
fn the_snapshot_says_since_when_a_thread_is_in_line_or_inside() {
    let clock = Arc::new(ManualClock::new());
    let registry = Registry::new(clock.clone());
    let second = Duration::from_secs(1);
    let forward = inside(&registry, Phase::Forward, 1);
    clock.advance(second);
    let capture = in_line(&registry, Phase::Capture, 2);
    let since = |registry: &Registry| {
        let visits = registry.snapshot().visits;
        visits.iter().map(|it| it.since).collect::<Vec<_>>()
    };
    assert_eq!(since(&registry), [Duration::ZERO, second]);
    clock.advance(second);
    assert!(registry.leave(forward));
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    assert_eq!(since(&registry), [2 * second]);
}

#[test]
fn a_reset_does_not_change_the_phases() {
    let registry = registry();
    let capture = inside(&registry, Phase::Capture, 1);
    assert_eq!(registry.reset(&actor(2), true), Ok(()));
    let _waiting = in_line(&registry, Phase::Forward, 2);
    assert!(registry.leave(capture));
}

#[test]
fn captures_and_forwards_of_many_threads_never_overlap_and_all_get_in() {
    let registry = registry();
    let visiting = Mutex::new(Vec::<(u64, Phase)>::new());
    let captures = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..6 {
            let (registry, visiting, captures) = (&registry, &visiting, &captures);
            scope.spawn(move || {
                for round in 0..100_u64 {
                    let phase = match (thread + round) % 3 {
                        0 => Phase::Load,
                        1 => Phase::Forward,
                        _ => Phase::Capture,
                    };
                    let visit = enter(registry, phase, thread).unwrap();
                    {
                        let mut visiting = visiting.lock().unwrap();
                        let others = visiting.iter().map(|(_, other)| *other);
                        let alone = |it| it == Phase::Capture || phase == Phase::Capture;
                        assert!(!others.into_iter().any(alone));
                        visiting.push((thread, phase));
                    }
                    thread::yield_now();
                    if phase == Phase::Capture {
                        captures.fetch_add(1, Ordering::Relaxed);
                        // A capture runs forwards.
                        let nested = inside(registry, Phase::Forward, thread);
                        assert!(registry.leave(nested));
                    }
                    visiting.lock().unwrap().retain(|(it, _)| *it != thread);
                    assert!(registry.leave(visit));
                }
            });
        }
    });
    assert_eq!(captures.into_inner(), 200);
    assert!(visits(&registry).is_empty());
}

#[test]
fn a_wait_for_a_key_that_begins_later_wakes_a_thread_that_may_overtake_now() {
    let registry = registry();
    let forward = inside(&registry, Phase::Forward, 1);
    let capture = in_line(&registry, Phase::Capture, 2);
    let ticket = lead(&registry, &request(3, 1));
    let (behind, entry) = registry.arrive(Phase::Load, &actor(3)).unwrap();
    assert!(matches!(entry, Entry::Wait { .. }));
    thread::scope(|scope| {
        let registry = &registry;
        let making = scope.spawn(move || {
            while let Ok(Entry::Wait { epoch, .. }) = registry.try_enter(behind) {
                registry.wait_to_enter(behind, epoch, FOREVER);
            }
            assert!(registry.leave(behind));
            registry.publish(ticket, spec(1), Origin::Created, 7)
        });
        let waiting = acquire(registry, request(1, 1), || {
            distguard_core::registry::Observed::Unknown
        });
        assert_eq!(waiting, Ok(Step::Join { generation: 1 }));
        assert_eq!(making.join().unwrap(), Ok(1));
    });
    assert!(registry.leave(forward));
    assert_eq!(registry.try_enter(capture), Ok(Entry::Inside));
    assert!(registry.is_ready(&W));
}
