//! Which thread waits for which key, and whether one more wait would never end.
//! Who leads a key is asked, not stored: the slots are the only truth about that.

use std::collections::BTreeMap;

use crate::actor::{Actor, ThreadId};
use crate::key::Key;

/// One step of a cycle: `thread` waits for `key`, which the next step's thread leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The waiting thread.
    pub thread: ThreadId,
    /// That thread and its runner, by name.
    pub name: String,
    /// What it waits for.
    pub key: Key,
}

/// The waits of all threads. A thread waits for at most one key and may lead several.
///
/// Invariant: no cycle. A thread that waits cannot begin to lead, so only a new wait can close
/// one, and every wait is checked before it is added.
#[derive(Debug, Default)]
pub struct WaitGraph {
    waits: BTreeMap<ThreadId, (Actor, Key)>,
}

impl WaitGraph {
    /// `actor` waits for `key` from now on, and for nothing else.
    pub fn begin(&mut self, actor: Actor, key: Key) {
        self.waits.insert(actor.thread, (actor, key));
    }

    /// `thread` waits no more.
    pub fn end(&mut self, thread: ThreadId) {
        self.waits.remove(&thread);
    }

    /// Who waits for `key`, by thread.
    pub fn waiters(&self, key: &Key) -> Vec<Actor> {
        self.waits
            .values()
            .filter(|(_, waited_for)| waited_for == key)
            .map(|(actor, _)| actor.clone())
            .collect()
    }

    /// The cycle that `waiter` would close by waiting for `key`; it starts with that wait.
    pub fn would_deadlock<'a>(
        &'a self,
        waiter: &'a Actor,
        key: &'a Key,
        leader_of: impl Fn(&Key) -> Option<ThreadId>,
    ) -> Option<Vec<Edge>> {
        let mut path = Vec::new();
        let (mut from, mut via) = (waiter, key);
        // Every thread has at most one way on, so a path longer than the graph runs in a cycle
        // that the invariant excludes; the bound keeps even that from looping.
        for _ in 0..=self.waits.len() {
            path.push(Edge {
                thread: from.thread,
                name: from.to_string(),
                key: via.clone(),
            });
            let leader = leader_of(via)?;
            if leader == waiter.thread {
                return Some(path);
            }
            let (next, waited_for) = self.waits.get(&leader)?;
            (from, via) = (next, waited_for);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(thread: u64) -> Actor {
        Actor {
            thread: ThreadId(thread),
            thread_name: format!("t{thread}"),
            runner: None,
        }
    }

    fn key(name: &str) -> Key {
        Key::Groups(name.into())
    }

    fn graph(waits: &[(u64, &str)]) -> WaitGraph {
        let mut graph = WaitGraph::default();
        for (thread, name) in waits {
            graph.begin(actor(*thread), key(name));
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
        let edges =
            graph.would_deadlock(&actor(waiter), &key(name), |key| leads.get(key).copied())?;
        let names: Vec<_> = edges
            .iter()
            .map(|edge| format!("{}>{}", edge.name, edge.key))
            .collect();
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
    fn a_wait_for_a_key_that_nobody_leads_ends() {
        assert_eq!(cycle(&[(2, "b")], &[("a", 2)], 1, "a"), None);
    }

    #[test]
    fn a_cycle_of_others_does_not_loop_the_search() {
        let leads = [("a", 2), ("b", 3), ("c", 2)];
        assert_eq!(cycle(&[(2, "b"), (3, "c")], &leads, 1, "a"), None);
    }

    #[test]
    fn a_thread_that_stopped_waiting_is_on_no_path() {
        let mut graph = graph(&[(2, "b"), (3, "b")]);
        assert_eq!(graph.waiters(&key("b")).len(), 2);
        graph.end(ThreadId(2));
        let waiters = graph.waiters(&key("b"));
        assert_eq!(waiters, [actor(3)]);
        let leader_of = |name: &Key| Some(ThreadId(if *name == key("a") { 2 } else { 1 }));
        let found = graph.would_deadlock(&actor(1), &key("a"), leader_of);
        assert_eq!(found, None);
    }
}
