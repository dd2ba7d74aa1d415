//! The calls that are inside methods of managers. A manager is ended when no call is inside.
//!
//! An event loop and a suspended coroutine are inside as long as they exist, so this is not a phase:
//! a call never waits to enter. It is refused once its manager has ended.
//!
//! Lock order: a leaf. No foreign code runs under the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::actor::Actor;
use crate::phases::RunnerId;
use crate::sync::{lock, wait_timeout, Condvar, Mutex};

/// Identifies one call. A process never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(u64);

/// One call inside a manager's method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The manager.
    pub manager: RunnerId,
    /// The method.
    pub step: Arc<str>,
    /// The thread in which it began.
    pub actor: Actor,
    /// Whether its manager ends only after it. Not so for loops that the manager's end stops.
    pub counts: bool,
}

#[derive(Debug, Default)]
struct State {
    inside: BTreeMap<CallId, Call>,
    ended: BTreeSet<RunnerId>,
    next: u64,
    /// Grows with each call that leaves.
    left: u64,
}

impl State {
    fn of(&self, manager: RunnerId) -> impl Iterator<Item = &Call> {
        let calls = self.inside.values();
        calls.filter(move |it| it.counts && it.manager == manager)
    }
}

/// Every call that is inside, and the managers that have ended.
#[derive(Debug, Default)]
pub struct Calls {
    state: Mutex<State>,
    moved: Condvar,
}

impl Calls {
    /// Notes that `call` is inside. `None`: its manager has ended.
    pub fn enter(&self, call: Call) -> Option<CallId> {
        let mut state = lock(&self.state);
        if state.ended.contains(&call.manager) {
            return None;
        }
        state.next += 1;
        let id = CallId(state.next);
        state.inside.insert(id, call);
        Some(id)
    }

    /// Notes that a call has left.
    pub fn leave(&self, id: CallId) {
        let mut state = lock(&self.state);
        state.inside.remove(&id);
        state.left += 1;
        drop(state);
        self.moved.notify_all();
    }

    /// Ends `manager` if no call that counts is inside. Returns whether it has ended.
    pub fn end_if_vacant(&self, manager: RunnerId) -> bool {
        let mut state = lock(&self.state);
        if state.of(manager).next().is_none() {
            state.ended.insert(manager);
        }
        state.ended.contains(&manager)
    }

    /// Ends `manager`: later calls are refused. Those inside continue.
    pub fn end(&self, manager: RunnerId) {
        lock(&self.state).ended.insert(manager);
    }

    /// Forgets `manager`, whose handle is gone: so no call can come.
    pub fn forget(&self, manager: RunnerId) {
        lock(&self.state).ended.remove(&manager);
    }

    /// The calls inside `manager` that count.
    pub fn inside(&self, manager: RunnerId) -> Vec<Call> {
        lock(&self.state).of(manager).cloned().collect()
    }

    /// Every call that is inside.
    pub fn all(&self) -> Vec<Call> {
        lock(&self.state).inside.values().cloned().collect()
    }

    /// A number that grows with each call that leaves.
    pub fn left(&self) -> u64 {
        lock(&self.state).left
    }

    /// Waits until a call has left after the moment at which `left` was read; at most `slice`.
    pub fn wait(&self, left: u64, slice: Duration) {
        let state = lock(&self.state);
        if state.left <= left {
            drop(wait_timeout(&self.moved, state, slice));
        }
    }

    /// Wakes every waiting thread.
    pub fn wake_all(&self) {
        lock(&self.state).left += 1;
        self.moved.notify_all();
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::actor::ThreadId;

    fn call(manager: u64, counts: bool) -> Call {
        Call {
            manager: RunnerId(manager),
            step: "run".into(),
            actor: Actor {
                thread: ThreadId(1),
                thread_name: "loop".into(),
                runner: None,
            },
            counts,
        }
    }

    #[test]
    fn a_manager_ends_when_its_last_call_has_left_and_refuses_later_ones() {
        let calls = Calls::default();
        let inside = calls.enter(call(1, true)).unwrap();
        calls.enter(call(2, true)).unwrap();
        assert!(!calls.end_if_vacant(RunnerId(1)));
        let left = calls.left();
        calls.leave(inside);
        calls.wait(left, Duration::from_secs(60)); // returns at once
        assert!(calls.end_if_vacant(RunnerId(1)));
        assert_eq!(calls.enter(call(1, true)), None);
        assert_eq!(calls.inside(RunnerId(2)).len(), 1);
    }

    #[test]
    fn a_loop_that_the_end_stops_does_not_keep_its_manager() {
        let calls = Calls::default();
        calls.enter(call(1, false)).unwrap();
        assert!(calls.end_if_vacant(RunnerId(1)));
        assert_eq!(calls.all().len(), 1);
    }

    #[test]
    fn a_manager_that_is_ended_by_force_leaves_its_calls_inside() {
        let calls = Calls::default();
        calls.enter(call(1, true)).unwrap();
        calls.end(RunnerId(1));
        assert_eq!(calls.enter(call(1, true)), None);
        assert_eq!(calls.inside(RunnerId(1)).len(), 1);
        calls.forget(RunnerId(1));
        assert!(calls.enter(call(1, true)).is_some());
    }
}
