//! The answer to a request in each state of the key. One thread; other threads are only names here.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::*;
use distguard_core::clock::{Clock, ManualClock};
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::policy::{Decision, Policy};
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Purpose};
use distguard_core::snapshot::SlotState;

const W: Key = Key::World;

fn reentrant(request: Request) -> Request {
    let policy = Policy {
        reentrant: true,
        ..request.policy
    };
    Request { policy, ..request }
}

fn without_reuse(request: Request) -> Request {
    Request {
        policy: Policy::default(),
        ..request
    }
}

#[test]
fn the_first_caller_leads_unless_the_state_exists_already() {
    for observed in [Observed::Unknown, Observed::Absent] {
        let registry = registry();
        let _ticket = lead(&registry, &observing(observed, request(1, 1)));
    }
    let registry = registry();
    let step = registry.try_acquire(&observing(Observed::Present(7), request(1, 1)));
    assert!(matches!(step, Ok(Step::Adopt(_))));
}

#[test]
fn an_equal_request_waits_for_the_leader_and_joins_what_it_publishes() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    match registry.try_acquire(&request(2, 1)) {
        Ok(Step::Wait { leader, .. }) => assert_eq!(leader, actor(1)),
        other => panic!("{other:?}"),
    }
    assert!(!registry.is_ready(&W));
    let generation = registry.publish(ticket, spec(1), Origin::Created, 7);
    assert_eq!(generation, Ok(1));
    assert!(registry.is_ready(&W));
    let step = registry.try_acquire(&request(2, 1));
    assert_eq!(step, Ok(Step::Join { generation: 1 }));
}

#[test]
fn an_unequal_request_is_refused_at_once_also_while_the_leader_is_initialising() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    let running = registry.try_acquire(&request(2, 2)).unwrap_err();
    let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
    let _lease = lease(&registry, &W, "a");
    let ready = registry.try_acquire(&request(2, 2)).unwrap_err();
    for (error, doing, holders) in [(running, Some(Purpose::Build), 0), (ready, None, 1)] {
        let Error::SpecMismatch { key, diff, owner } = error else {
            panic!("{error:?}");
        };
        assert_eq!(key, W);
        assert_eq!(diff.len(), 1);
        assert_eq!(diff[0].existing, Some(1.into()));
        assert_eq!(diff[0].requested, Some(2.into()));
        assert_eq!((owner.leader, owner.purpose), (actor(1), doing));
        assert_eq!(owner.holders.len(), holders);
    }
}

#[test]
fn an_equal_request_that_may_not_reuse_is_refused_at_once() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    let refused = |step| matches!(step, Err(Error::ReuseForbidden { .. }));
    let request = without_reuse(request(2, 1));
    assert!(refused(registry.try_acquire(&request)));
    let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
    assert!(refused(registry.try_acquire(&request)));
}

#[test]
fn a_leader_that_asks_again_goes_on_only_if_it_is_reentrant() {
    let registry = registry();
    let _ticket = lead(&registry, &request(1, 1));
    let again = registry.try_acquire(&reentrant(request(1, 2)));
    assert_eq!(again, Ok(Step::Nested));
    let Err(Error::Deadlock { cycle }) = registry.try_acquire(&request(1, 1)) else {
        panic!("a thread that waits for itself");
    };
    assert_eq!(cycle.len(), 1);
    assert_eq!(
        (cycle[0].thread, &cycle[0].subject),
        (actor(1).thread, &(&W).into())
    );
}

#[test]
fn no_request_is_refused_by_the_spec_of_an_adoption_before_the_real_one_is_known() {
    let registry = registry();
    let present = Observed::Present(7);
    let Ok(Step::Adopt(ticket)) = registry.try_acquire(&observing(present, request(1, 1))) else {
        panic!("should adopt");
    };
    assert!(is_wait(&registry.try_acquire(&request(2, 2))));
    let _ = registry.publish(ticket, spec(2), Origin::Adopted, 7);
    let joins = registry.try_acquire(&observing(present, request(2, 2)));
    assert_eq!(joins, Ok(Step::Join { generation: 1 }));
    let leader = registry.try_acquire(&observing(present, request(1, 1)));
    assert!(matches!(leader, Err(Error::SpecMismatch { .. })));
}

#[test]
fn a_waiter_for_a_teardown_is_compared_with_no_spec_and_leads_after_it() {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    let ticket = begin_teardown(&registry, &W, 1, false);
    assert!(is_wait(&registry.try_acquire(&request(2, 2))));
    let own = registry.try_acquire(&reentrant(request(1, 1)));
    assert!(matches!(own, Err(Error::Deadlock { .. })));
    assert!(registry.end_teardown(ticket));
    let _ticket = lead(&registry, &request(2, 2));
}

#[test]
fn a_failed_leader_leaves_its_reason_and_the_next_one_leads() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    assert!(registry.fail(ticket, "boom"));
    let failed = slot(&registry, &W);
    assert_eq!(failed.state, SlotState::Idle);
    assert_eq!(
        (failed.failures, failed.last_failure),
        (1, Some("boom".into()))
    );
    assert_eq!(build(&registry, &request(2, 2), 7), 1);
    assert_eq!(slot(&registry, &W).last_failure, None);
}

#[test]
fn a_poisoned_key_refuses_every_request_whatever_it_observes() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    assert!(registry.poison(ticket, "half"));
    for observed in [Observed::Unknown, Observed::Absent, Observed::Present(7)] {
        let refused = registry.try_acquire(&observing(observed, request(2, 1)));
        let Err(Error::Poisoned { reason, by, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!((reason.as_str(), by), ("half", actor(1)));
    }
}

#[test]
fn a_caller_that_looked_before_the_publish_does_not_undo_it() {
    let registry = registry();
    let early = observing(Observed::Absent, request(2, 1));
    build(&registry, &request(1, 1), 7);
    let Ok(Step::Wait { epoch, .. }) = registry.try_acquire(&early) else {
        panic!("should look again");
    };
    // Would sleep forever if there were anything to wait for.
    registry.wait(&early, epoch, FOREVER);
    let late = observing(Observed::Present(7), early);
    let step = registry.try_acquire(&late);
    assert_eq!(step, Ok(Step::Join { generation: 1 }));
    assert!(!decisions(&registry).contains(&Decision::OutOfBand));
}

#[test]
fn state_that_was_destroyed_outside_of_the_registry_is_made_anew() {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    let old = lease(&registry, &W, "a");
    let gone = observing(Observed::Absent, request(2, 2));
    assert!(is_wait(&registry.try_acquire(&gone)));
    assert_eq!(build(&registry, &gone, 8), 2);
    assert!(!registry.release(old));
    let snapshot = registry.snapshot();
    let noticed = snapshot
        .events
        .iter()
        .find(|event| event.decision == Decision::OutOfBand);
    let noticed = noticed.expect("it is recorded");
    assert_eq!((&noticed.actor, noticed.generation), (&actor(2), 1));
    assert!(noticed.detail.contains("held by 'a'"));
}

#[test]
fn state_that_was_replaced_outside_of_the_registry_is_adopted() {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    let other = observing(Observed::Present(8), request(2, 1));
    assert!(is_wait(&registry.try_acquire(&other)));
    let step = registry.try_acquire(&other);
    let Ok(Step::Adopt(ticket)) = step else {
        panic!("{step:?}");
    };
    let generation = registry.publish(ticket, spec(1), Origin::Adopted, 8);
    assert_eq!(generation, Ok(2));
}

#[test]
fn a_doubt_counts_only_against_the_state_it_was_about() {
    let registry = registry();
    build(&registry, &request(1, 1), 7);
    let gone = observing(Observed::Absent, request(2, 1));
    assert!(is_wait(&registry.try_acquire(&gone)));
    let ticket = begin_teardown(&registry, &W, 1, false);
    registry.end_teardown(ticket);
    build(&registry, &request(1, 1), 8);
    assert!(is_wait(&registry.try_acquire(&gone)));
    // Another answer in between also ends the doubt.
    let trusting = registry.try_acquire(&request(2, 1));
    assert_eq!(trusting, Ok(Step::Join { generation: 2 }));
    assert!(is_wait(&registry.try_acquire(&gone)));
    assert!(registry.is_ready(&W));
}

#[test]
fn a_waiter_looks_again_when_another_leader_has_taken_over() {
    let registry = registry();
    let ticket = lead(&registry, &request(1, 1));
    let Ok(Step::Wait { epoch, .. }) = registry.try_acquire(&request(2, 1)) else {
        panic!("should wait");
    };
    registry.fail(ticket, "boom");
    let _ticket = lead(&registry, &request(3, 2));
    // Would sleep forever although the new leader builds something else.
    registry.wait(&request(2, 1), epoch, FOREVER);
    let refused = registry.try_acquire(&request(2, 1));
    assert!(matches!(refused, Err(Error::SpecMismatch { .. })));
}

#[test]
fn keys_do_not_block_each_other() {
    let registry = registry();
    let _world = lead(&registry, &request(1, 1));
    let _a = lead(&registry, &request_for(2, &groups("a")));
    let _b = lead(&registry, &request_for(3, &groups("b")));
    let _none = lead(&registry, &request_for(1, &groups("")));
}

#[test]
fn every_decision_is_recorded_with_its_actor_and_how_long_it_waited() {
    let clock = Arc::new(ManualClock::new());
    let registry = Registry::new(clock.clone());
    let ticket = lead(&registry, &request(1, 1));
    let _ = registry.try_acquire(&request(2, 1));
    clock.advance(Duration::from_secs(3));
    let waited = Request {
        waited: clock.now(),
        ..request(2, 1)
    };
    // Only the first wait is recorded.
    let _ = registry.try_acquire(&waited);
    let _ = registry.publish(ticket, spec(1), Origin::Created, 7);
    let _ = registry.try_acquire(&waited);
    let _ = registry.try_acquire(&request(3, 2));
    let events = registry.snapshot().events;
    let expected = [
        (Decision::Lead, 1, 0, 0),
        (Decision::Wait, 2, 0, 0),
        (Decision::Publish, 1, 1, 0),
        (Decision::Join, 2, 1, 3),
        (Decision::Refuse, 3, 1, 0),
    ];
    let recorded: Vec<_> = events
        .iter()
        .map(|it| {
            let waited = it.waited.as_secs();
            (it.decision, it.actor.thread.0, it.generation, waited)
        })
        .collect();
    assert_eq!(recorded, expected);
    assert_eq!(registry.events_since(3).len(), 2);
    assert_eq!(events[4].at, Duration::from_secs(3));
    assert!(events[4].detail.contains("tp: existing 1, requested 2"));
}

#[test]
fn a_ticket_of_another_registry_is_stale() {
    let parent = registry();
    let child = Registry::with_instance(Arc::new(ManualClock::new()), 4711);
    let inherited = || lead(&registry(), &request(1, 1));
    let ticket = lead(&child, &request(1, 1));
    let stale = child.publish(inherited(), spec(1), Origin::Created, 7);
    assert_eq!(stale, Err(Error::StaleTicket { key: W }));
    assert!(!child.fail(inherited(), "stale"));
    assert!(!child.poison(inherited(), "stale"));
    assert!(!child.end_teardown(inherited()));
    let generation = child.publish(ticket, spec(1), Origin::Created, 7);
    assert_eq!(generation, Ok(1));
    build(&parent, &request(1, 1), 7);
    let inherited = lease(&parent, &W, "a");
    let own = lease(&child, &W, "a");
    assert!(!child.release(inherited));
    assert!(child.release(own));
}
