//! Records what each thread waits for, and finds a wait that would never end.
//! Blocking threads are looked up, not stored: slots and phases are the only source for them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::actor::{Actor, ThreadId};
use crate::key::Key;
use crate::phases::Access;

/// The subject of an event, a wait or an error.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A shared piece of state.
    Key(Key),
    /// A phase, and the runners for which it is entered.
    Phase(Access),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => key.fmt(f),
            Self::Phase(access) => access.fmt(f),
        }
    }
}

impl From<&Key> for Subject {
    fn from(key: &Key) -> Self {
        Self::Key(key.clone())
    }
}

impl<T: Into<Access> + Copy> From<&T> for Subject {
    fn from(access: &T) -> Self {
        Self::Phase((*access).into())
    }
}

/// One edge of a cycle: `thread` waits for `subject`, which the next edge's thread holds or blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The waiting thread.
    pub thread: ThreadId,
    /// The name of that thread and of its runner.
    pub name: String,
    /// What it waits for.
    pub subject: Subject,
}

impl Edge {
    pub(crate) fn new(actor: &Actor, subject: impl Into<Subject>) -> Self {
        Self {
            thread: actor.thread,
            name: actor.to_string(),
            subject: subject.into(),
        }
    }
}

/// A thread that sleeps until a slot changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    /// The waiting thread and its runner.
    pub actor: Actor,
    /// The key of the slot.
    pub key: Key,
    /// The registry's epoch when the wait began.
    pub epoch: u64,
}

/// The waits of all threads for slots. A thread may lead several slots while it waits for one.
///
/// Invariant: no cycle. A thread that waits cannot begin to lead, so only a new wait can close
/// one, and every wait is checked before it is added.
#[derive(Debug, Default)]
pub struct WaitGraph {
    waits: BTreeMap<ThreadId, Wait>,
}

impl WaitGraph {
    /// Records that `actor` waits for `key`, and for nothing else.
    pub fn begin(&mut self, actor: Actor, key: Key, epoch: u64) {
        self.waits.insert(actor.thread, Wait { actor, key, epoch });
    }

    /// Records that `thread` no longer waits.
    pub fn end(&mut self, thread: ThreadId) {
        self.waits.remove(&thread);
    }

    /// What `thread` waits for.
    pub fn wait_of(&self, thread: ThreadId) -> Option<&Wait> {
        self.waits.get(&thread)
    }

    /// The actors that wait for `key`, by thread.
    pub fn waiters(&self, key: &Key) -> Vec<Actor> {
        self.waits
            .values()
            .filter(|wait| wait.key == *key)
            .map(|wait| wait.actor.clone())
            .collect()
    }
}

/// The cycle that the thread of `first` would close by beginning that wait; `first` is its start.
///
/// `holders` returns the threads that block an edge, `waits` the edges of a thread that already
/// waits. Depth first; every thread is visited once, so it ends even with a cycle elsewhere.
pub(crate) fn find_cycle(
    first: Edge,
    holders: &impl Fn(&Edge) -> Vec<ThreadId>,
    waits: &impl Fn(ThreadId) -> Vec<Edge>,
) -> Option<Vec<Edge>> {
    let origin = first.thread;
    let mut path = vec![first];
    let found = close(origin, &mut path, &mut BTreeSet::new(), holders, waits);
    found.then_some(path)
}

/// Extends `path` until it comes back to `origin`; leaves it unchanged if it cannot.
fn close(
    origin: ThreadId,
    path: &mut Vec<Edge>,
    seen: &mut BTreeSet<ThreadId>,
    holders: &impl Fn(&Edge) -> Vec<ThreadId>,
    waits: &impl Fn(ThreadId) -> Vec<Edge>,
) -> bool {
    let Some(last) = path.last() else {
        return false;
    };
    for holder in holders(last) {
        if holder == origin {
            return true;
        }
        if !seen.insert(holder) {
            continue;
        }
        for edge in waits(holder) {
            path.push(edge);
            if close(origin, path, seen, holders, waits) {
                return true;
            }
            path.pop();
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(thread: u64) -> Actor {
        Actor {
            thread: ThreadId(thread),
            thread_name: format!("t{thread}").into(),
            runner: None,
        }
    }

    fn key(name: &str) -> Key {
        Key::Groups(name.into())
    }

    fn graph(waits: &[(u64, &str)]) -> WaitGraph {
        let mut graph = WaitGraph::default();
        for (thread, name) in waits {
            graph.begin(actor(*thread), key(name), 0);
        }
        graph
    }

    fn cycle(
        waits: &[(u64, &str)],
        leads: &[(&str, u64)],
        waiter: u64,
        name: &str,
    ) -> Option<String> {
        let leads: BTreeMap<_, _> = leads.iter().map(|(k, t)| (key(k), ThreadId(*t))).collect();
        let graph = graph(waits);
        let holders = |edge: &Edge| match &edge.subject {
            Subject::Key(key) => leads.get(key).copied().into_iter().collect(),
            Subject::Phase(_) => vec![],
        };
        let found = find_cycle(Edge::new(&actor(waiter), &key(name)), &holders, &|thread| {
            let wait = graph.wait_of(thread);
            wait.map(|wait| Edge::new(&wait.actor, &wait.key))
                .into_iter()
                .collect()
        });
        let names = |edge: &Edge| format!("{}>{}", edge.name, edge.subject);
        let names: Vec<_> = found?.iter().map(names).collect();
        Some(names.join(" "))
    }

    #[test]
    fn waiting_for_a_thread_that_does_not_wait_is_fine() {
        assert_eq!(cycle(&[], &[("a", 2)], 1, "a"), None);
        assert_eq!(cycle(&[(2, "b")], &[("a", 2), ("b", 3)], 1, "a"), None);
    }

    #[test]
    fn waiting_for_oneself_is_a_cycle_of_one() {
        let found = cycle(&[], &[("a", 1)], 1, "a");
        assert_eq!(found.as_deref(), Some("thread t1>groups:a"));
    }

    #[test]
    fn a_cycle_is_named_from_the_waiter_back_to_it() {
        let leads = [("a", 2), ("b", 3), ("c", 1)];
        let found = cycle(&[(2, "b"), (3, "c")], &leads, 1, "a");
        assert_eq!(
            found.as_deref(),
            Some("thread t1>groups:a thread t2>groups:b thread t3>groups:c")
        );
    }

    #[test]
    fn a_thread_that_leads_several_keys_can_close_a_cycle_through_any() {
        let leads = [("a", 2), ("b", 1), ("c", 1)];
        assert!(cycle(&[(2, "b")], &leads, 1, "a").is_some());
        assert!(cycle(&[(2, "c")], &leads, 1, "a").is_some());
    }

    #[test]
    fn a_wait_for_a_key_without_a_leader_ends() {
        assert_eq!(cycle(&[(2, "b")], &[("a", 2)], 1, "a"), None);
    }

    #[test]
    fn a_cycle_of_others_does_not_loop_the_search() {
        let leads = [("a", 2), ("b", 3), ("c", 2)];
        assert_eq!(cycle(&[(2, "b"), (3, "c")], &leads, 1, "a"), None);
    }

    #[test]
    fn a_thread_that_stopped_waiting_is_not_a_waiter() {
        let mut graph = graph(&[(2, "b"), (3, "b")]);
        assert_eq!(graph.waiters(&key("b")).len(), 2);
        graph.end(ThreadId(2));
        assert_eq!(graph.waiters(&key("b")), [actor(3)]);
        assert_eq!(graph.wait_of(ThreadId(2)), None);
    }

    #[test]
    fn a_cycle_is_found_through_any_of_several_holders_and_waits() {
        let phase = |thread| Edge::new(&actor(thread), &crate::phases::Phase::Capture);
        let holders = |edge: &Edge| match edge.thread.0 {
            1 => vec![ThreadId(2), ThreadId(3)],
            3 => vec![ThreadId(4)],
            5 => vec![ThreadId(1)],
            _ => vec![],
        };
        let waits = |thread: ThreadId| match thread.0 {
            2 => vec![phase(2)],
            3 => vec![phase(6), phase(3)],
            4 => vec![phase(5)],
            _ => vec![],
        };
        let found = find_cycle(phase(1), &holders, &waits).unwrap();
        let threads: Vec<_> = found.iter().map(|edge| edge.thread.0).collect();
        assert_eq!(threads, [1, 3, 5]);
    }
}
