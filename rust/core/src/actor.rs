//! Who asks: a thread, and the runner it builds.

use std::fmt;

/// A thread, by the number its runtime gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ThreadId(pub u64);

/// A thread that acts on behalf of a runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Its number.
    pub thread: ThreadId,
    /// Its name, for messages.
    pub thread_name: String,
    /// The runner it builds, when that has a name.
    pub runner: Option<String>,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.runner {
            Some(runner) => write!(f, "'{runner}' (thread {})", self.thread_name),
            None => write!(f, "thread {}", self.thread_name),
        }
    }
}
