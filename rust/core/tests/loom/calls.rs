//! Calls inside a manager's methods: it ends only while none is inside, and no caller of the end is
//! left waiting.

use std::sync::Arc;

use distguard_core::calls::{Call, CallId, Calls};
use distguard_core::phases::RunnerId;
use loom::thread;

use crate::common::{actor, FOREVER};
use crate::explore::{all, explore, Bound, Guarded};

const MANAGER: RunnerId = RunnerId(1);

fn enter(thread: u64, calls: &Calls) -> Option<CallId> {
    calls.enter(Call {
        manager: MANAGER,
        step: "run".into(),
        actor: actor(thread),
        counts: true,
    })
}

/// A call that reads what the manager has, unless the manager has ended.
fn call(thread: u64, calls: &Calls, guarded: &Guarded) -> bool {
    let id = enter(thread, calls);
    if let Some(id) = id {
        guarded.read();
        calls.leave(id);
    }
    id.is_some()
}

/// Waits for the calls that are inside, ends the manager, and changes what it has.
fn end(calls: &Calls, guarded: &Guarded) {
    loop {
        let left = calls.left();
        if calls.end_if_vacant(MANAGER) {
            break;
        }
        calls.wait(left, FOREVER);
    }
    guarded.change();
}

#[test]
fn a_manager_ends_only_while_no_call_is_inside_and_refuses_later_ones() {
    explore(Bound::Preemptions { full: 5, short: 3 }, || {
        let (calls, guarded) = (Arc::new(Calls::default()), Guarded::default());
        let callers = [1, 2].map(|number| {
            let (calls, guarded) = (calls.clone(), guarded.clone());
            thread::spawn(move || call(number, &calls, &guarded))
        });
        end(&calls, &guarded);
        assert!(!call(0, &calls, &guarded));
        all(callers);
        assert!(calls.all().is_empty());
    });
}

#[test]
fn two_threads_that_end_one_manager_both_hear_of_the_last_call() {
    explore(Bound::None, || {
        let calls = Arc::new(Calls::default());
        let inside = enter(0, &calls).expect("the manager has not ended");
        let enders = [1, 2].map(|_| {
            let calls = calls.clone();
            thread::spawn(move || end(&calls, &Guarded::default()))
        });
        calls.leave(inside);
        all(enders);
    });
}
