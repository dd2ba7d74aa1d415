//! Which thread waits for which key, and who leads it: finds a wait that would never end.

use std::collections::HashMap;

use crate::actor::ThreadId;
use crate::key::Key;

/// One step of a cycle: `thread` waits for `key`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The waiting thread.
    pub thread: ThreadId,
    /// What it waits for.
    pub key: Key,
}

/// Threads that wait. Who leads a key is asked of the caller, who keeps it anyway.
#[derive(Debug, Default)]
pub struct WaitGraph {
    waits: HashMap<ThreadId, Key>,
}

impl WaitGraph {
    /// Records that `thread` waits for `key`. A thread waits for one key at a time.
    pub fn begin(&mut self, thread: ThreadId, key: Key) {
        self.waits.insert(thread, key);
    }

    /// Records that `thread` waits no longer.
    pub fn end(&mut self, thread: ThreadId) {
        self.waits.remove(&thread);
    }

    /// How many threads wait for `key`.
    pub fn waiters(&self, key: &Key) -> usize {
        self.waits.values().filter(|waited| *waited == key).count()
    }

    /// The cycle that `thread` would close by waiting for `key`, if any.
    pub fn cycle(
        &self,
        thread: ThreadId,
        key: &Key,
        leader_of: impl Fn(&Key) -> Option<ThreadId>,
    ) -> Option<Vec<Edge>> {
        let mut path = vec![Edge {
            thread,
            key: key.clone(),
        }];
        // Each thread waits for at most one key, so a path cannot be longer than the waits.
        while path.len() <= self.waits.len() + 1 {
            let leader = leader_of(&path.last()?.key)?;
            if leader == thread {
                return Some(path);
            }
            path.push(Edge {
                thread: leader,
                key: self.waits.get(&leader)?.clone(),
            });
        }
        None
    }
}
