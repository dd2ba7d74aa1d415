//! Decides which scope a `publish` configures: the caller's own while no other execution or runner
//! is in it, else a new one. Only decides; the binding has the values of a scope.
//!
//! ```text
//! state       what it means                                   a publish that finds it
//! Vacant      nothing is published, or its residents are gone claims it
//! Claimed(c)  published, and executions that hold c build     with c: as Pending; else: a new scope
//! Pending     published, and no execution holds the claim     moves it, then claims the scope;
//!                                                             if it is equal: replaces it
//! Inhabited   residents live here: runners or managers        makes a new scope
//!
//! from        by                     to
//! Vacant      publish, claim_vacant  Claimed(new)
//! Claimed(c)  release(c)             Pending
//! Claimed(c)  undo(c)                the state before
//! Pending     resume                 Claimed(new)
//! Pending     publish                Claimed(new); what was pending is Pending in a new scope
//! Claimed(c)  publish with c         the same
//! any         bind                   Inhabited
//! Inhabited   the last unbind        Vacant
//! ```
//!
//! A manager (SGLang's Scheduler, `TokenizerManager` or `DetokenizerManager`) lives in the scope that
//! it reads, as a runner does, and no runner is its draft.
//!
//! Invariant: `publish` never reassigns a scope while a resident lives in it or another execution is
//! about to build one in it. A configuration that was published and not built can be found until it
//! is dropped.

use std::collections::BTreeMap;

use crate::key::Key;
use crate::phases::RunnerId;
use crate::sync::{lock, Mutex};

/// Identifies a scope. 0 is SGLang's default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeId(pub u64);

/// SGLang's own, process-wide scope. It always exists.
pub const DEFAULT: ScopeId = ScopeId(0);

/// Identifies the claim of one publish. It travels with the execution that published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimId(pub u64);

/// The scope that a `publish` configures, and the claim that its execution holds from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// The current scope, in place.
    Replace(ClaimId),
    /// The current scope, after its content has been moved to the scope given here.
    Aside(ClaimId, ScopeId),
    /// A new scope.
    New(ClaimId, ScopeId),
}

impl Publish {
    /// The claim, wherever it is.
    pub fn claim(self) -> ClaimId {
        match self {
            Self::Replace(claim) | Self::Aside(claim, _) | Self::New(claim, _) => claim,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Vacant,
    Claimed(ClaimId),
    Pending,
}

/// What lives in a scope and reads its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resident {
    /// A runner, which also holds leases.
    Runner,
    /// A manager, which computes nothing and holds none.
    Manager,
}

#[derive(Debug, Default)]
struct Entry {
    state: State,
    /// What lives here, oldest first: later runners are drafts of the first one. While there is any
    /// the scope is Inhabited and `state` is Vacant.
    residents: Vec<(RunnerId, Resident)>,
    /// The generation of each shared piece of state that the scope built or joined last.
    joined: BTreeMap<Key, u64>,
}

impl Entry {
    /// The runners that live here, oldest first.
    fn runners(&self) -> impl Iterator<Item = RunnerId> + '_ {
        let residents = self.residents.iter();
        residents.filter_map(|(id, kind)| (*kind == Resident::Runner).then_some(*id))
    }
}

/// Claims and residents of every scope. Pure.
#[derive(Debug)]
pub struct ScopeLedger {
    entries: BTreeMap<ScopeId, Entry>,
    next: u64,
    /// How often a scope's state has changed.
    changes: u64,
}

impl ScopeLedger {
    /// A ledger whose scope numbers no other instance uses. So in a forked child, the end of an
    /// inherited scope ends none of the child's own.
    pub fn with_instance(instance: u32) -> Self {
        Self {
            entries: BTreeMap::from([(DEFAULT, Entry::default())]),
            next: (u64::from(instance) << 32) + 1,
            changes: 0,
        }
    }

    fn fresh(&mut self) -> u64 {
        let fresh = self.next;
        self.next += 1;
        fresh
    }

    /// Changes whenever a scope's state does. Equal stamps: a scope that was not claimed has the
    /// content that was seen in between.
    pub fn stamp(&self) -> u64 {
        self.changes
    }

    /// Decides which scope a `publish` configures, and claims it.
    ///
    /// `current` is the caller's scope, and `mine` is the claim that its execution holds, if any.
    /// `is_other`: the pending configuration differs from the one that is published now.
    /// `may_put_aside`: it may be moved out of the default scope (with several ranks its groups may
    /// not).
    pub fn publish(
        &mut self,
        current: ScopeId,
        mine: Option<ClaimId>,
        is_other: bool,
        may_put_aside: bool,
    ) -> Publish {
        self.changes += 1;
        let claim = ClaimId(self.fresh());
        let aside = ScopeId(self.fresh());
        let Some(entry) = self.entries.get_mut(&current) else {
            return self.publish_new(claim, aside);
        };
        let is_mine = |held| Some(held) == mine;
        let taken = matches!(entry.state, State::Claimed(held) if !is_mine(held));
        // A pending configuration is kept: in a new scope, or where it is.
        let keeps = is_other && entry.state != State::Vacant;
        let movable = current == DEFAULT && may_put_aside;
        if !entry.residents.is_empty() || taken || (keeps && !movable) {
            return self.publish_new(claim, aside);
        }
        entry.state = State::Claimed(claim);
        if !keeps {
            return Publish::Replace(claim);
        }
        let moved = Entry {
            state: State::Pending,
            residents: Vec::new(),
            joined: std::mem::take(&mut entry.joined),
        };
        self.entries.insert(aside, moved);
        Publish::Aside(claim, aside)
    }

    /// Undoes `Publish::Aside`, if the content that was moved is still pending there: it is to be
    /// moved back, and is pending or has the claim that the caller held `before`. Otherwise it stays,
    /// because a build has gone on with it, and the default scope is vacant. Returns whether it is to
    /// be moved back.
    #[must_use]
    pub fn take_back(&mut self, claim: ClaimId, aside: ScopeId, before: Option<ClaimId>) -> bool {
        self.changes += 1;
        let moved = self.entries.get(&aside);
        let is_pending = |it: &Entry| it.state == State::Pending && it.residents.is_empty();
        if !moved.is_some_and(is_pending) {
            self.undo(DEFAULT, claim, None);
            return false;
        }
        let joined = self.entries.remove(&aside).unwrap_or_default().joined;
        if let Some(entry) = self.claimed(DEFAULT, claim) {
            entry.state = before.map_or(State::Pending, State::Claimed);
            entry.joined = joined;
        }
        true
    }

    fn publish_new(&mut self, claim: ClaimId, scope: ScopeId) -> Publish {
        let entry = self.entries.entry(scope).or_default();
        entry.state = State::Claimed(claim);
        Publish::New(claim, scope)
    }

    /// Creates a scope in which nothing was published: its context comes from elsewhere.
    pub fn create(&mut self) -> ScopeId {
        let scope = ScopeId(self.fresh());
        self.entries.insert(scope, Entry::default());
        scope
    }

    /// Claims a scope for a cleanup, if it has no resident and none is about to be built.
    /// `undo` releases the claim.
    pub fn claim_vacant(&mut self, scope: ScopeId) -> Option<ClaimId> {
        let claim = ClaimId(self.fresh());
        let entry = self.entries.get_mut(&scope)?;
        let vacant = entry.residents.is_empty() && entry.state == State::Vacant;
        vacant.then(|| {
            entry.state = State::Claimed(claim);
            claim
        })
    }

    /// The claim with which an execution continues in a scope that was published in: the claim that
    /// is held, or else a new one. None when there is nothing to continue.
    pub fn resume(&mut self, scope: ScopeId) -> Option<ClaimId> {
        self.changes += 1;
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

    /// Undoes a publish that got `claim` and failed: its scope is again as it was for the caller,
    /// which held `before`.
    pub fn undo(&mut self, scope: ScopeId, claim: ClaimId, before: Option<ClaimId>) {
        self.changes += 1;
        if let Some(entry) = self.claimed(scope, claim) {
            entry.state = before.map_or(State::Vacant, State::Claimed);
        }
    }

    /// Records that no execution holds `claim` any more.
    pub fn release(&mut self, scope: ScopeId, claim: ClaimId) {
        self.changes += 1;
        if let Some(entry) = self.claimed(scope, claim) {
            entry.state = State::Pending;
        }
    }

    fn claimed(&mut self, scope: ScopeId, claim: ClaimId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&scope)?;
        (entry.state == State::Claimed(claim)).then_some(entry)
    }

    /// Records that a resident is constructed in the scope, which ends its claim. Returns the target
    /// if it is a draft.
    pub fn bind(&mut self, scope: ScopeId, id: RunnerId, kind: Resident) -> Option<RunnerId> {
        self.changes += 1;
        let entry = self.entries.entry(scope).or_default();
        entry.state = State::Vacant;
        let target = entry.runners().next();
        entry.residents.push((id, kind));
        target.filter(|_| kind == Resident::Runner)
    }

    /// Records that a resident of the scope was closed or is gone.
    pub fn unbind(&mut self, scope: ScopeId, id: RunnerId) {
        self.changes += 1;
        if let Some(entry) = self.entries.get_mut(&scope) {
            entry.residents.retain(|(it, _)| *it != id);
        }
    }

    /// Records that the scope uses this generation of `key` from now on.
    pub fn join(&mut self, scope: ScopeId, key: Key, generation: u64) {
        let entry = self.entries.entry(scope).or_default();
        if matches!(key, Key::Groups(_)) {
            // A scope uses the shared groups or its own: those that it joined last count.
            entry.joined.retain(|it, _| !matches!(it, Key::Groups(_)));
        }
        entry.joined.insert(key, generation);
    }

    /// The generation of `key` that the scope joined last. Its runners take leases on that
    /// generation or on none. It stays when the state is torn down: objects that the scope still
    /// refers to are then stale.
    pub fn joined(&self, scope: ScopeId, key: &Key) -> Option<u64> {
        self.entries.get(&scope)?.joined.get(key).copied()
    }

    /// How many residents the scope has.
    pub fn live(&self, scope: ScopeId) -> usize {
        let entry = self.entries.get(&scope);
        entry.map_or(0, |entry| entry.residents.len())
    }

    /// How many runners live in the scope.
    pub fn live_runners(&self, scope: ScopeId) -> usize {
        let entry = self.entries.get(&scope);
        entry.map_or(0, |entry| entry.runners().count())
    }

    /// The claim of the executions that have published in the scope and not built yet.
    pub fn claim(&self, scope: ScopeId) -> Option<ClaimId> {
        match self.entries.get(&scope)?.state {
            State::Claimed(claim) => Some(claim),
            State::Vacant | State::Pending => None,
        }
    }

    /// Drops the scope. The default one stays.
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

/// The ledger behind a lock that is never held while foreign code runs.
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
