//! The slot's transitions: from which states each is allowed, and what it leaves behind.

use super::*;
use crate::actor::ThreadId;

const NOW: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(2);

fn actor(thread: u64) -> Actor {
    Actor {
        thread: ThreadId(thread),
        thread_name: format!("t{thread}").into(),
        runner: None,
    }
}

fn spec(tp: i64) -> Spec {
    Spec::from_iter([("tp", tp)])
}

fn holder() -> Holder {
    Holder {
        name: "runner".into(),
        actor: actor(1),
        since: NOW,
    }
}

fn idle() -> Slot {
    Slot::new(0)
}

fn building(ticket: u64) -> Slot {
    let mut slot = idle();
    assert!(slot.lead(ticket, actor(1), Task::Build(spec(1)), NOW));
    slot
}

fn ready(ticket: u64) -> Slot {
    let mut slot = building(ticket);
    let by = slot.publish(ticket, spec(2), Origin::Created, 77, LATER);
    assert_eq!(by, Some(actor(1)));
    slot
}

fn tearing_down(ticket: u64) -> Slot {
    let mut slot = ready(1);
    assert!(slot.lease(LeaseId(5), holder()));
    assert!(slot.tear_down(ticket, actor(2), "", LATER));
    slot
}

fn poisoned() -> Slot {
    let mut slot = building(1);
    assert_eq!(slot.poison(1, "half", LATER), Some(actor(1)));
    slot
}

#[test]
fn only_an_idle_slot_is_led() {
    for mut slot in [building(1), ready(1), tearing_down(2), poisoned()] {
        let before = slot.state().clone();
        assert!(!slot.lead(9, actor(9), Task::Build(spec(9)), LATER));
        assert_eq!(*slot.state(), before);
    }
}

#[test]
fn only_a_ready_slot_is_torn_down_leased_or_joined() {
    for mut slot in [idle(), building(1), tearing_down(2), poisoned()] {
        let before = slot.state().clone();
        assert!(!slot.tear_down(9, actor(9), "", LATER));
        assert!(!slot.lease(LeaseId(9), holder()));
        assert_eq!(slot.ready(), None);
        assert_eq!(*slot.state(), before);
    }
}

#[test]
fn only_the_leading_ticket_resolves_a_slot() {
    for mut slot in [idle(), building(1), ready(1), tearing_down(2), poisoned()] {
        let before = (slot.state().clone(), slot.generation(), slot.failures());
        assert_eq!(slot.publish(9, spec(9), Origin::Created, 9, LATER), None);
        assert_eq!(slot.fail(9, "stale"), None);
        assert_eq!(slot.poison(9, "stale", LATER), None);
        assert_eq!(slot.end(9), None);
        let after = (slot.state().clone(), slot.generation(), slot.failures());
        assert_eq!(after, before);
    }
}

#[test]
fn publishing_keeps_what_was_published_and_counts_a_generation() {
    let slot = ready(1);
    let ready = slot.ready().unwrap();
    assert_eq!((&ready.spec, ready.identity), (&spec(2), 77));
    assert_eq!((&ready.by, ready.since), (&actor(1), LATER));
    assert_eq!(slot.generation(), 1);
    assert_eq!(slot.last_failure(), None);
}

#[test]
fn a_failed_build_leaves_nothing_but_its_reason() {
    let mut slot = building(1);
    assert_eq!(slot.fail(1, "boom"), Some(actor(1)));
    assert_eq!(*slot.state(), State::Idle);
    assert_eq!((slot.failures(), slot.last_failure()), (1, Some("boom")));
    assert!(slot.lead(2, actor(2), Task::Build(spec(1)), LATER));
    let _ = slot.publish(2, spec(1), Origin::Created, 1, LATER);
    assert_eq!((slot.failures(), slot.last_failure()), (1, None));
}

#[test]
fn a_failed_teardown_puts_the_state_back_with_its_leases() {
    let mut slot = tearing_down(2);
    let _ = slot.fail(2, "did not begin");
    assert_eq!(slot.ready().unwrap().identity, 77);
    assert_eq!(slot.generation(), 1);
    assert_eq!(slot.release(LeaseId(5)), Some(holder()));
}

#[test]
fn an_ended_teardown_takes_the_leases_with_it() {
    let mut slot = tearing_down(2);
    assert_eq!(slot.holders(), [holder()]);
    assert_eq!(slot.end(2), Some(actor(2)));
    assert_eq!(*slot.state(), State::Idle);
    assert_eq!(slot.release(LeaseId(5)), None);
}

#[test]
fn a_lease_is_released_once_also_during_a_teardown() {
    let mut slot = tearing_down(2);
    assert_eq!(slot.release(LeaseId(5)), Some(holder()));
    assert_eq!(slot.release(LeaseId(5)), None);
    let _ = slot.fail(2, "did not begin");
    assert!(slot.holders().is_empty());
}

#[test]
fn forgetting_empties_ready_and_poisoned_slots_and_keeps_the_generation() {
    for mut slot in [ready(1), poisoned()] {
        let generation = slot.generation();
        assert!(slot.forget());
        assert_eq!(*slot.state(), State::Idle);
        assert_eq!((slot.generation(), slot.last_failure()), (generation, None));
    }
    for mut slot in [idle(), building(1), tearing_down(2)] {
        let before = slot.state().clone();
        assert!(!slot.forget());
        assert_eq!(*slot.state(), before);
    }
}

#[test]
fn a_running_slot_returns_its_purpose_and_its_spec() {
    let slot = building(1);
    let running = slot.running().unwrap();
    assert_eq!(
        (running.purpose(), running.spec()),
        (Purpose::Build, &spec(1))
    );
    let slot = tearing_down(2);
    let running = slot.running().unwrap();
    assert_eq!(
        (running.purpose(), running.spec()),
        (Purpose::Teardown, &spec(2))
    );
    let mut slot = idle();
    slot.lead(1, actor(1), Task::Adopt(spec(3)), NOW);
    assert_eq!(slot.running().unwrap().purpose(), Purpose::Adopt);
}
