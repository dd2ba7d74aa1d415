//! Whose context a `publish` configures: the caller's own while no runner lives in it, else a new
//! one. Decides only; the values of a scope are the binding's.

use std::collections::HashMap;

use crate::actor::ThreadId;
use crate::sync::{lock, Mutex};

/// Names a scope. 0 is SGLang's default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeId(pub u64);

/// SGLang's own, process-wide scope.
pub const DEFAULT: ScopeId = ScopeId(0);

/// Which scope a `publish` configures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// The current one, in place.
    Replace(ScopeId),
    /// A fresh one, which becomes the calling thread's.
    New(ScopeId),
}

#[derive(Debug, Default)]
struct Entry {
    /// The thread that published and has not built its runner yet.
    builder: Option<ThreadId>,
    runners: usize,
}

/// Builders and live runners of every scope. Pure.
#[derive(Debug, Default)]
pub struct ScopeLedger {
    entries: HashMap<ScopeId, Entry>,
    last: u64,
}

impl ScopeLedger {
    /// Decides whose context a `publish` by `thread` configures, and claims it for that thread.
    ///
    /// The current scope is replaced, as SGLang does, only while no runner lives in it and no
    /// other living thread has published in it to build one.
    pub fn publish(
        &mut self,
        current: ScopeId,
        thread: ThreadId,
        is_alive: impl Fn(ThreadId) -> bool,
    ) -> Publish {
        let entry = self.entries.entry(current).or_default();
        let claimed_by_other = entry
            .builder
            .is_some_and(|builder| builder != thread && is_alive(builder));
        if entry.runners == 0 && !claimed_by_other {
            entry.builder = Some(thread);
            return Publish::Replace(current);
        }
        let id = self.create();
        self.entries.entry(id).or_default().builder = Some(thread);
        Publish::New(id)
    }

    /// A scope that nobody publishes in: it gets a context made elsewhere.
    pub fn create(&mut self) -> ScopeId {
        self.last += 1;
        let id = ScopeId(self.last);
        self.entries.insert(id, Entry::default());
        id
    }

    /// `thread`'s publish failed: others may publish there again.
    pub fn abandon(&mut self, scope: ScopeId, thread: ThreadId) {
        if let Some(entry) = self.entries.get_mut(&scope) {
            if entry.builder == Some(thread) {
                entry.builder = None;
            }
        }
    }

    /// A runner is constructed in the scope; it is no longer just claimed.
    pub fn bind_runner(&mut self, scope: ScopeId) {
        let entry = self.entries.entry(scope).or_default();
        entry.runners += 1;
        entry.builder = None;
    }

    /// A runner of the scope was closed or is gone.
    pub fn unbind_runner(&mut self, scope: ScopeId) {
        if let Some(entry) = self.entries.get_mut(&scope) {
            entry.runners = entry.runners.saturating_sub(1);
        }
    }

    /// How many runners live in the scope.
    pub fn live(&self, scope: ScopeId) -> usize {
        self.entries.get(&scope).map_or(0, |entry| entry.runners)
    }

    /// The scope is gone. The default one stays.
    pub fn drop_scope(&mut self, scope: ScopeId) {
        if scope != DEFAULT {
            self.entries.remove(&scope);
        }
    }
}

/// The ledger behind a lock that is never held while anything else runs.
#[derive(Debug, Default)]
pub struct Scopes(Mutex<ScopeLedger>);

impl Scopes {
    /// Runs one transition of the ledger. `change` must not block.
    pub fn with<T>(&self, change: impl FnOnce(&mut ScopeLedger) -> T) -> T {
        change(&mut lock(&self.0))
    }

    /// The scope is gone; see `ScopeLedger::drop_scope`.
    pub fn drop_scope(&self, scope: ScopeId) {
        self.with(|ledger| ledger.drop_scope(scope));
    }
}
