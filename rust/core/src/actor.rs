//! Actors: a thread and, where known, the runner it works for.
//! Plain data; never looks at the real threads.

use std::fmt;
use std::sync::Arc;

/// A thread, as the caller numbers threads (in Python, `threading.get_ident()`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ThreadId(pub u64);

/// A thread that acts, and its runner. The thread identifies it; the names are for people.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Actor {
    /// The thread that acts.
    pub thread: ThreadId,
    /// The thread's name.
    pub thread_name: Arc<str>,
    /// The name of the runner it acts for, if it is known.
    pub runner: Option<Arc<str>>,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.runner {
            Some(runner) => write!(f, "runner '{runner}' (thread {})", self.thread_name),
            None => write!(f, "thread {}", self.thread_name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_actor_is_named_by_its_runner_if_it_has_one() {
        let mut actor = Actor {
            thread: ThreadId(7),
            thread_name: "worker-1".into(),
            runner: None,
        };
        assert_eq!(actor.to_string(), "thread worker-1");
        actor.runner = Some("draft".into());
        assert_eq!(actor.to_string(), "runner 'draft' (thread worker-1)");
    }
}
