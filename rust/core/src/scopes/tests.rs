use super::*;

const RUNNER: RunnerId = RunnerId(7);

fn replaced(publish: Publish) -> ClaimId {
    match publish {
        Publish::Replace(claim) => claim,
        other => panic!("should replace, but: {other:?}"),
    }
}

fn new(publish: Publish) -> (ClaimId, ScopeId) {
    match publish {
        Publish::New(claim, scope) => (claim, scope),
        other => panic!("should be new, but: {other:?}"),
    }
}

fn aside(publish: Publish) -> (ClaimId, ScopeId) {
    match publish {
        Publish::Aside(claim, scope) => (claim, scope),
        other => panic!("should put aside, but: {other:?}"),
    }
}

#[test]
fn a_stamp_changes_when_a_publish_begins_and_when_it_is_over() {
    let mut ledger = ScopeLedger::default();
    let mut seen = ledger.stamp();
    let mut has_changed =
        |ledger: &ScopeLedger| std::mem::replace(&mut seen, ledger.stamp()) != ledger.stamp();
    let claim = replaced(ledger.publish(DEFAULT, None, false, true));
    assert!(has_changed(&ledger));
    assert!(!has_changed(&ledger));
    ledger.release(DEFAULT, claim);
    assert!(has_changed(&ledger));
    let (claim, scope) = aside(ledger.publish(DEFAULT, None, true, true));
    assert!(has_changed(&ledger));
    assert!(ledger.take_back(claim, scope, None));
    assert!(has_changed(&ledger));
    let claim = ledger.resume(DEFAULT).unwrap();
    assert!(has_changed(&ledger));
    ledger.undo(DEFAULT, claim, None);
    assert!(has_changed(&ledger));
}

#[test]
fn what_a_build_has_gone_on_with_is_not_taken_back() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    ledger.release(DEFAULT, first);
    let (second, scope) = aside(ledger.publish(DEFAULT, None, true, true));
    let resumed = ledger.resume(scope).unwrap();
    assert!(!ledger.take_back(second, scope, None));
    assert_eq!(ledger.claim(scope), Some(resumed));
    replaced(ledger.publish(DEFAULT, None, false, true));
}

#[test]
fn the_first_publish_configures_the_default_scope() {
    let mut ledger = ScopeLedger::default();
    let claim = replaced(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.claim(DEFAULT), Some(claim));
}

#[test]
fn the_holder_of_the_claim_may_publish_again_and_others_get_a_new_scope() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    let again = replaced(ledger.publish(DEFAULT, Some(first), false, true));
    assert_ne!(first, again);
    let (other, scope) = new(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.claim(DEFAULT), Some(again));
    assert_eq!(ledger.claim(scope), Some(other));
}

#[test]
fn of_two_executions_that_inherited_one_claim_the_first_to_publish_takes_it_over() {
    let mut ledger = ScopeLedger::default();
    let parents = replaced(ledger.publish(DEFAULT, None, false, true));
    let first = replaced(ledger.publish(DEFAULT, Some(parents), false, true));
    let (_, second) = new(ledger.publish(DEFAULT, Some(parents), false, true));
    assert_ne!(second, DEFAULT);
    assert_eq!(ledger.claim(DEFAULT), Some(first));
}

#[test]
fn a_pending_configuration_is_put_aside_and_can_be_resumed() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    ledger.join(DEFAULT, Key::World, 3);
    ledger.release(DEFAULT, first);
    assert_eq!(ledger.claim(DEFAULT), None);
    let (second, scope) = aside(ledger.publish(DEFAULT, None, true, true));
    assert_eq!(ledger.claim(DEFAULT), Some(second));
    assert_eq!(ledger.joined(DEFAULT, &Key::World), None);
    assert_eq!(ledger.joined(scope, &Key::World), Some(3));
    let resumed = ledger.resume(scope).unwrap();
    assert_eq!(ledger.resume(scope), Some(resumed));
    // Its executions are gone again, and the configuration is not lost.
    ledger.release(scope, resumed);
    assert!(ledger.resume(scope).is_some());
}

#[test]
fn a_configuration_that_could_not_be_moved_is_pending_again_in_its_old_scope() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    ledger.join(DEFAULT, Key::World, 3);
    ledger.release(DEFAULT, first);
    let (claim, scope) = aside(ledger.publish(DEFAULT, None, true, true));
    assert!(ledger.take_back(claim, scope, None));
    assert_eq!(ledger.joined(DEFAULT, &Key::World), Some(3));
    assert_eq!(ledger.resume(scope), None);
    assert!(ledger.resume(DEFAULT).is_some());
}

#[test]
fn a_failed_publish_of_another_configuration_leaves_the_claim_that_was_there() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, true, true));
    let (second, scope) = aside(ledger.publish(DEFAULT, Some(first), true, true));
    assert!(ledger.take_back(second, scope, Some(first)));
    assert_eq!(ledger.claim(DEFAULT), Some(first));
    assert_eq!(ledger.resume(scope), None);
}

#[test]
fn a_pending_configuration_is_never_moved_while_an_execution_continues_with_it() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    ledger.release(DEFAULT, first);
    let resumed = ledger.resume(DEFAULT).unwrap();
    let _ = new(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.claim(DEFAULT), Some(resumed));
}

#[test]
fn a_configuration_that_may_not_be_moved_stays_and_the_publish_gets_a_new_scope() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, false));
    ledger.release(DEFAULT, first);
    let _ = new(ledger.publish(DEFAULT, None, true, false));
    assert!(ledger.resume(DEFAULT).is_some());
}

#[test]
fn a_configuration_that_was_not_built_is_kept_when_its_execution_publishes_another_one() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, true, true));
    let (second, scope) = aside(ledger.publish(DEFAULT, Some(first), true, true));
    assert!(ledger.resume(scope).is_some());
    assert_eq!(ledger.claim(DEFAULT), Some(second));
    // An equal publish replaces it, and a configuration in a new scope stays there.
    let third = replaced(ledger.publish(DEFAULT, Some(second), false, true));
    let (own, fresh) = new(ledger.publish(DEFAULT, None, true, true));
    let (_, another) = new(ledger.publish(fresh, Some(own), true, true));
    assert_ne!(fresh, another);
    assert_eq!(ledger.claim(fresh), Some(own));
    assert_eq!(ledger.claim(DEFAULT), Some(third));
}

#[test]
fn a_scope_with_a_live_runner_is_never_replaced() {
    let mut ledger = ScopeLedger::default();
    let claim = replaced(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.bind(DEFAULT, RUNNER, Resident::Runner), None);
    assert_eq!((ledger.live(DEFAULT), ledger.claim(DEFAULT)), (1, None));
    let _ = new(ledger.publish(DEFAULT, Some(claim), false, true));
    assert_eq!(ledger.resume(DEFAULT), None);
}

#[test]
fn a_second_runner_of_a_scope_is_a_draft_of_the_first() {
    let mut ledger = ScopeLedger::default();
    assert_eq!(ledger.bind(DEFAULT, RUNNER, Resident::Runner), None);
    assert_eq!(
        ledger.bind(DEFAULT, RunnerId(8), Resident::Runner),
        Some(RUNNER)
    );
}

#[test]
fn a_scope_whose_runners_are_all_gone_is_replaced() {
    let mut ledger = ScopeLedger::default();
    ledger.bind(DEFAULT, RUNNER, Resident::Runner);
    ledger.bind(DEFAULT, RunnerId(8), Resident::Runner);
    ledger.unbind(DEFAULT, RUNNER);
    let _ = new(ledger.publish(DEFAULT, None, false, true));
    ledger.unbind(DEFAULT, RunnerId(8));
    ledger.unbind(DEFAULT, RunnerId(8));
    assert_eq!(ledger.live(DEFAULT), 0);
    replaced(ledger.publish(DEFAULT, None, false, true));
}

#[test]
fn a_failed_publish_leaves_the_claim_that_was_there() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    let second = replaced(ledger.publish(DEFAULT, Some(first), false, true));
    ledger.undo(DEFAULT, first, None); // not the current claim
    assert_eq!(ledger.claim(DEFAULT), Some(second));
    ledger.undo(DEFAULT, second, Some(first));
    assert_eq!(ledger.claim(DEFAULT), Some(first));
    ledger.undo(DEFAULT, first, None);
    assert_eq!(ledger.claim(DEFAULT), None);
    replaced(ledger.publish(DEFAULT, None, false, true));
}

#[test]
fn the_end_of_an_earlier_claim_ends_nothing() {
    let mut ledger = ScopeLedger::default();
    let first = replaced(ledger.publish(DEFAULT, None, false, true));
    let second = replaced(ledger.publish(DEFAULT, Some(first), false, true));
    ledger.release(DEFAULT, first);
    assert_eq!(ledger.claim(DEFAULT), Some(second));
}

#[test]
fn a_vacant_scope_is_claimed_once_and_no_publish_gets_it_meanwhile() {
    let mut ledger = ScopeLedger::default();
    let tidies = ledger.claim_vacant(DEFAULT).unwrap();
    assert_eq!(ledger.claim_vacant(DEFAULT), None);
    let _ = new(ledger.publish(DEFAULT, None, false, true));
    ledger.undo(DEFAULT, tidies, None);
    replaced(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.claim_vacant(DEFAULT), None);
    ledger.bind(DEFAULT, RUNNER, Resident::Runner);
    assert_eq!(ledger.claim_vacant(DEFAULT), None);
    assert_eq!(ledger.claim_vacant(ScopeId(99)), None);
}

#[test]
fn a_created_scope_is_open_to_the_first_publish_in_it() {
    let mut ledger = ScopeLedger::default();
    let scope = ledger.create();
    assert_eq!(ledger.claim(scope), None);
    replaced(ledger.publish(scope, None, false, true));
}

#[test]
fn a_scope_knows_which_generation_it_joined_last() {
    let mut ledger = ScopeLedger::default();
    let scope = ledger.create();
    ledger.join(scope, Key::World, 1);
    ledger.join(scope, Key::World, 2);
    assert_eq!(ledger.joined(scope, &Key::World), Some(2));
    assert_eq!(ledger.joined(DEFAULT, &Key::World), None);
}

#[test]
fn a_dropped_scope_is_gone_and_the_default_one_stays() {
    let mut ledger = ScopeLedger::default();
    let scope = ledger.create();
    ledger.drop_scope(scope);
    let (_, other) = new(ledger.publish(scope, None, false, true));
    assert_ne!(other, scope);
    ledger.drop_scope(DEFAULT);
    let claim = replaced(ledger.publish(DEFAULT, None, false, true));
    ledger.undo(scope, claim, None);
    ledger.unbind(scope, RUNNER);
    assert_eq!(ledger.live(scope), 0);
}

#[test]
fn another_instance_gives_out_other_numbers() {
    let mut parent = ScopeLedger::default();
    let mut child = ScopeLedger::with_instance(4711);
    assert_ne!(parent.create(), child.create());
}

#[test]
fn a_manager_keeps_its_scope_from_a_publish_and_is_no_target() {
    let mut ledger = ScopeLedger::default();
    let claim = replaced(ledger.publish(DEFAULT, None, false, true));
    assert_eq!(ledger.bind(DEFAULT, RunnerId(8), Resident::Manager), None);
    assert_eq!(ledger.bind(DEFAULT, RUNNER, Resident::Runner), None);
    assert_eq!((ledger.live(DEFAULT), ledger.live_runners(DEFAULT)), (2, 1));
    ledger.unbind(DEFAULT, RUNNER);
    // Also from the execution that published for the manager.
    new(ledger.publish(DEFAULT, Some(claim), true, true));
    assert_eq!(ledger.claim_vacant(DEFAULT), None);
    ledger.unbind(DEFAULT, RunnerId(8));
    replaced(ledger.publish(DEFAULT, None, false, true));
}
