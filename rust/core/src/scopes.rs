//! Whose context a `publish` configures: the caller's own while nobody else is in it, else a new
//! one. Decides only; the values of a scope are the binding's.
//!
//! ```text
//! state       what it means                                   a publish that finds it
//! Vacant      nothing is published here, or it is used up     claims it
//! Claimed(c)  published, and executions that hold c build     with c: as Pending; else: a new scope
//! Pending     published, and no execution holds the claim     puts it aside, then claims the scope;
//!                                                             the same again: replaces
//! Inhabited   runners live here                               makes a new scope
//!
//! from        by                     to
//! Vacant      publish, claim_vacant  Claimed(new)
//! Claimed(c)  release(c)             Pending
//! Claimed(c)  abandon(c)             what it was before
//! Pending     resume                 Claimed(new)
//! Pending     publish                Claimed(new); what was there is Pending in a scope of its own
//! Claimed(c)  publish with c         likewise
//! any         bind_runner            Inhabited
//! Inhabited   the last unbind        Vacant
//! ```
//!
//! Invariant: `publish` never gives a scope away while a runner lives in it or another execution is
//! about to build one in it; and what was published and not built is found until it is dropped.

use std::collections::BTreeMap;

use crate::key::Key;
use crate::phases::RunnerId;
use crate::sync::{lock, Mutex};

/// Names a scope. 0 is SGLang's default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeId(pub u64);

/// SGLang's own, process-wide scope. It always exists.
pub const DEFAULT: ScopeId = ScopeId(0);

/// Names what one publish claimed. It travels with the execution that published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimId(pub u64);

/// Which scope a `publish` configures, and what its execution holds from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// The current one, in place.
    Replace(ClaimId),
    /// The current one, after what it holds has been moved to the scope named here.
    Aside(ClaimId, ScopeId),
    /// A fresh one.
    New(ClaimId, ScopeId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Vacant,
    Claimed(ClaimId),
    Pending,
}

#[derive(Debug, Default)]
struct Entry {
    state: State,
    /// Runners that live here, oldest first: later ones are drafts of the first. While there are
    /// any the scope is Inhabited and `state` is Vacant.
    runners: Vec<RunnerId>,
    /// The generation of each shared piece of state that the scope built or joined last.
    joined: BTreeMap<Key, u64>,
}

/// Claims and live runners of every scope. Pure.
#[derive(Debug)]
pub struct ScopeLedger {
    entries: BTreeMap<ScopeId, Entry>,
    next: u64,
}

impl ScopeLedger {
    /// A ledger that numbers its scopes as no other instance does: in a forked child, the end of
    /// an inherited scope then ends none of the child's own.
    pub fn with_instance(instance: u32) -> Self {
        Self {
            entries: BTreeMap::from([(DEFAULT, Entry::default())]),
            next: (u64::from(instance) << 32) + 1,
        }
    }

    fn fresh(&mut self) -> u64 {
        let fresh = self.next;
        self.next += 1;
        fresh
    }

    /// Decides whose context a `publish` configures, and claims it.
    ///
    /// Args: the caller's current scope; the claim that its execution holds, if any; whether what
    /// is pending is something else than what is published now; and whether it may be moved out of
    /// the default scope (with several ranks its groups may not).
    pub fn publish(
        &mut self,
        current: ScopeId,
        mine: Option<ClaimId>,
        is_other: bool,
        may_put_aside: bool,
    ) -> Publish {
        let claim = ClaimId(self.fresh());
        let aside = ScopeId(self.fresh());
        let Some(entry) = self.entries.get_mut(&current) else {
            return self.publish_new(claim, aside);
        };
        let is_mine = |held| Some(held) == mine;
        let taken = matches!(entry.state, State::Claimed(held) if !is_mine(held));
        // What is pending is kept: in a scope of its own, or where it is.
        let keeps = is_other && entry.state != State::Vacant;
        let movable = current == DEFAULT && may_put_aside;
        if !entry.runners.is_empty() || taken || (keeps && !movable) {
            return self.publish_new(claim, aside);
        }
        entry.state = State::Claimed(claim);
        if !keeps {
            return Publish::Replace(claim);
        }
        let moved = Entry {
            state: State::Pending,
            runners: Vec::new(),
            joined: std::mem::take(&mut entry.joined),
        };
        self.entries.insert(aside, moved);
        Publish::Aside(claim, aside)
    }

    /// Undoes `Publish::Aside`: what was moved, or was to be, is where it was, pending or with the
    /// claim that the caller held `before`.
    pub fn take_back(&mut self, claim: ClaimId, aside: ScopeId, before: Option<ClaimId>) {
        let Some(moved) = self.entries.remove(&aside) else {
            return;
        };
        if let Some(entry) = self.claimed(DEFAULT, claim) {
            entry.state = before.map_or(State::Pending, State::Claimed);
            entry.joined = moved.joined;
        }
    }

    fn publish_new(&mut self, claim: ClaimId, scope: ScopeId) -> Publish {
        let entry = self.entries.entry(scope).or_default();
        entry.state = State::Claimed(claim);
        Publish::New(claim, scope)
    }

    /// A scope that nobody has published in: its context comes from elsewhere.
    pub fn create(&mut self) -> ScopeId {
        let scope = ScopeId(self.fresh());
        self.entries.insert(scope, Entry::default());
        scope
    }

    /// Claims a scope in which no runner lives and none is about to be built, to tidy up in;
    /// `abandon` gives it back.
    pub fn claim_vacant(&mut self, scope: ScopeId) -> Option<ClaimId> {
        let claim = ClaimId(self.fresh());
        let entry = self.entries.get_mut(&scope)?;
        let vacant = entry.runners.is_empty() && entry.state == State::Vacant;
        vacant.then(|| {
            entry.state = State::Claimed(claim);
            claim
        })
    }

    /// The claim under which work goes on in a scope that was published in: the one that is held,
    /// or a new one where none is. None when there is nothing to go on with.
    pub fn resume(&mut self, scope: ScopeId) -> Option<ClaimId> {
        let claim = ClaimId(self.fresh());
        let entry = self.entries.get_mut(&scope)?;
        match entry.state {
            State::Vacant => None,
            State::Claimed(held) => Some(held),
            State::Pending => {
                entry.state = State::Claimed(claim);
                Some(claim)
            }
        }
    }

    /// The publish that got `claim` failed: its scope is again what it was for the caller, who
    /// held `before`.
    pub fn undo(&mut self, scope: ScopeId, claim: ClaimId, before: Option<ClaimId>) {
        if let Some(entry) = self.claimed(scope, claim) {
            entry.state = before.map_or(State::Vacant, State::Claimed);
        }
    }

    /// No execution holds `claim` any more.
    pub fn release(&mut self, scope: ScopeId, claim: ClaimId) {
        if let Some(entry) = self.claimed(scope, claim) {
            entry.state = State::Pending;
        }
    }

    fn claimed(&mut self, scope: ScopeId, claim: ClaimId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&scope)?;
        (entry.state == State::Claimed(claim)).then_some(entry)
    }

    /// A runner is constructed in the scope, which is no longer just claimed. Returns the runner
    /// whose draft it is, if it is one.
    pub fn bind_runner(&mut self, scope: ScopeId, runner: RunnerId) -> Option<RunnerId> {
        let entry = self.entries.entry(scope).or_default();
        entry.state = State::Vacant;
        entry.runners.push(runner);
        Some(entry.runners[0]).filter(|first| *first != runner)
    }

    /// A runner of the scope was closed or is gone.
    pub fn unbind_runner(&mut self, scope: ScopeId, runner: RunnerId) {
        if let Some(entry) = self.entries.get_mut(&scope) {
            entry.runners.retain(|it| *it != runner);
        }
    }

    /// The scope uses this generation of `key` from now on.
    pub fn join(&mut self, scope: ScopeId, key: Key, generation: u64) {
        let entry = self.entries.entry(scope).or_default();
        if matches!(key, Key::Groups(_)) {
            // A scope uses the shared groups or its own: what it joined last counts.
            entry.joined.retain(|it, _| !matches!(it, Key::Groups(_)));
        }
        entry.joined.insert(key, generation);
    }

    /// The generation of `key` that the scope joined last: what its runners take leases on, at that
    /// generation or not at all. It stays when the state is torn down: what a scope still refers to
    /// is then stale.
    pub fn joined(&self, scope: ScopeId, key: &Key) -> Option<u64> {
        self.entries.get(&scope)?.joined.get(key).copied()
    }

    /// How many runners live in the scope.
    pub fn live(&self, scope: ScopeId) -> usize {
        let entry = self.entries.get(&scope);
        entry.map_or(0, |entry| entry.runners.len())
    }

    /// The claim of the executions that have published in the scope and not built yet.
    pub fn claim(&self, scope: ScopeId) -> Option<ClaimId> {
        match self.entries.get(&scope)?.state {
            State::Claimed(claim) => Some(claim),
            State::Vacant | State::Pending => None,
        }
    }

    /// The scope is gone. The default one stays.
    pub fn drop_scope(&mut self, scope: ScopeId) {
        if scope != DEFAULT {
            self.entries.remove(&scope);
        }
    }
}

impl Default for ScopeLedger {
    fn default() -> Self {
        Self::with_instance(0)
    }
}

/// The ledger behind a lock that is never held while anything foreign runs.
#[derive(Debug, Default)]
pub struct Scopes(Mutex<ScopeLedger>);

impl Scopes {
    /// See `ScopeLedger::with_instance`.
    pub fn with_instance(instance: u32) -> Self {
        Self(Mutex::new(ScopeLedger::with_instance(instance)))
    }

    /// Runs transitions of the ledger under its lock. `change` must neither block nor run Python.
    pub fn with<T>(&self, change: impl FnOnce(&mut ScopeLedger) -> T) -> T {
        change(&mut lock(&self.0))
    }
}

#[cfg(test)]
#[path = "scopes/tests.rs"]
mod tests;
