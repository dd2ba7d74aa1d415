//! Whose context a `publish` configures: the caller's own while nobody else is in it, else a new
//! one. Decides only; the values of a scope are the binding's.

use std::collections::BTreeMap;

use crate::actor::ThreadId;
use crate::key::Key;
use crate::sync::{lock, Mutex};

/// Names a scope. 0 is SGLang's default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ScopeId(pub u64);

/// SGLang's own, process-wide scope. It always exists.
pub const DEFAULT: ScopeId = ScopeId(0);

/// Which scope a `publish` configures. The calling thread is its builder now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Publish {
    /// The current one, in place.
    Replace(ScopeId),
    /// A fresh one, which becomes the calling thread's.
    New(ScopeId),
}

/// A thread that published and has not built its runner yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Builder {
    thread: ThreadId,
    /// Its publishes that did not fail: a failed second one must not give the first one's up.
    claims: usize,
}

#[derive(Debug, Default)]
struct Entry {
    builder: Option<Builder>,
    runners: usize,
    /// The generation of each shared piece of state that the scope built or joined last.
    joined: BTreeMap<Key, u64>,
}

/// Builders and live runners of every scope. Pure.
///
/// Invariant: `publish` never gives a scope to a thread while a runner lives in it or another
/// living thread is about to build one in it.
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
        let entry = self.entries.get_mut(&current);
        let Some(entry) = entry.filter(|entry| entry.runners == 0) else {
            return self.publish_new(thread);
        };
        match &mut entry.builder {
            Some(builder) if builder.thread == thread => builder.claims += 1,
            Some(builder) if is_alive(builder.thread) => return self.publish_new(thread),
            _ => entry.builder = Some(Builder { thread, claims: 1 }),
        }
        Publish::Replace(current)
    }

    fn publish_new(&mut self, thread: ThreadId) -> Publish {
        let scope = self.create();
        let builder = Some(Builder { thread, claims: 1 });
        self.entries.insert(
            scope,
            Entry {
                builder,
                ..Entry::default()
            },
        );
        Publish::New(scope)
    }

    /// A scope that nobody has published in: its context comes from elsewhere.
    pub fn create(&mut self) -> ScopeId {
        let scope = ScopeId(self.next);
        self.next += 1;
        self.entries.insert(scope, Entry::default());
        scope
    }

    /// Claims a scope in which no runner lives and nobody is about to build one, for `thread` to
    /// tidy up in; `abandon` gives it back.
    pub fn claim_vacant(&mut self, scope: ScopeId, thread: ThreadId) -> bool {
        let entry = self.entries.get_mut(&scope);
        let Some(entry) = entry.filter(|it| it.runners == 0 && it.builder.is_none()) else {
            return false;
        };
        entry.builder = Some(Builder { thread, claims: 1 });
        true
    }

    /// `thread`'s last publish in the scope failed: what it claimed is free again.
    pub fn abandon(&mut self, scope: ScopeId, thread: ThreadId) {
        let Some(entry) = self.entries.get_mut(&scope) else {
            return;
        };
        if let Some(builder) = entry.builder.filter(|it| it.thread == thread) {
            let claims = builder.claims - 1;
            entry.builder = (claims > 0).then_some(Builder { thread, claims });
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
        self.entries.get(&scope).map_or(0, |entry| entry.runners)
    }

    /// The thread that published in the scope and has not built its runner yet.
    pub fn builder(&self, scope: ScopeId) -> Option<ThreadId> {
        Some(self.claim(scope)?.thread)
    }

    fn claim(&self, scope: ScopeId) -> Option<Builder> {
        self.entries.get(&scope)?.builder
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

    /// See `ScopeLedger::publish`. `is_alive` runs unlocked, after the builder it is asked about
    /// has claimed (a list made earlier lacks threads that have started since), and again if the
    /// builder changes. If it fails, nothing was decided.
    pub fn publish<E>(
        &self,
        current: ScopeId,
        thread: ThreadId,
        is_alive: impl Fn(ThreadId) -> Result<bool, E>,
    ) -> Result<Publish, E> {
        loop {
            let builder = self.with(|ledger| ledger.claim(current));
            let alive = match builder.filter(|builder| builder.thread != thread) {
                Some(builder) => is_alive(builder.thread)?,
                None => false,
            };
            let decided = self.with(|ledger| {
                // The answer is about the claim that was asked for, and no other.
                let same = ledger.claim(current) == builder;
                same.then(|| ledger.publish(current, thread, |_| alive))
            });
            if let Some(publish) = decided {
                return Ok(publish);
            }
        }
    }

    /// See `ScopeLedger::drop_scope`.
    pub fn drop_scope(&self, scope: ScopeId) {
        self.with(|ledger| ledger.drop_scope(scope));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ThreadId = ThreadId(1);
    const TWO: ThreadId = ThreadId(2);

    fn everyone(_: ThreadId) -> bool {
        true
    }

    fn nobody(_: ThreadId) -> bool {
        false
    }

    fn new(publish: Publish) -> ScopeId {
        match publish {
            Publish::New(scope) => scope,
            Publish::Replace(scope) => panic!("{scope:?} was replaced"),
        }
    }

    #[test]
    fn the_first_publish_configures_the_default_scope() {
        let mut ledger = ScopeLedger::default();
        let publish = ledger.publish(DEFAULT, ONE, everyone);
        assert_eq!(publish, Publish::Replace(DEFAULT));
        assert_eq!(ledger.builder(DEFAULT), Some(ONE));
    }

    #[test]
    fn a_builder_may_publish_again_and_others_get_a_scope_of_their_own() {
        let mut ledger = ScopeLedger::default();
        let _ = ledger.publish(DEFAULT, ONE, everyone);
        let again = ledger.publish(DEFAULT, ONE, everyone);
        assert_eq!(again, Publish::Replace(DEFAULT));
        let other = new(ledger.publish(DEFAULT, TWO, everyone));
        assert_ne!(other, DEFAULT);
        assert_eq!(ledger.builder(DEFAULT), Some(ONE));
        assert_eq!(ledger.builder(other), Some(TWO));
    }

    #[test]
    fn a_builder_that_died_claims_nothing() {
        let mut ledger = ScopeLedger::default();
        let _ = ledger.publish(DEFAULT, ONE, nobody);
        let publish = ledger.publish(DEFAULT, TWO, nobody);
        assert_eq!(publish, Publish::Replace(DEFAULT));
        assert_eq!(ledger.builder(DEFAULT), Some(TWO));
    }

    #[test]
    fn a_scope_with_a_live_runner_is_never_replaced() {
        let mut ledger = ScopeLedger::default();
        let _ = ledger.publish(DEFAULT, ONE, everyone);
        ledger.bind_runner(DEFAULT);
        assert_eq!((ledger.live(DEFAULT), ledger.builder(DEFAULT)), (1, None));
        let first = new(ledger.publish(DEFAULT, ONE, nobody));
        let second = new(ledger.publish(DEFAULT, ONE, nobody));
        assert_ne!(first, second);
    }

    #[test]
    fn a_scope_whose_runners_are_all_gone_is_replaced() {
        let mut ledger = ScopeLedger::default();
        ledger.bind_runner(DEFAULT);
        ledger.bind_runner(DEFAULT);
        ledger.unbind_runner(DEFAULT);
        let _ = new(ledger.publish(DEFAULT, ONE, everyone));
        ledger.unbind_runner(DEFAULT);
        ledger.unbind_runner(DEFAULT);
        assert_eq!(ledger.live(DEFAULT), 0);
        let publish = ledger.publish(DEFAULT, ONE, everyone);
        assert_eq!(publish, Publish::Replace(DEFAULT));
    }

    #[test]
    fn a_failed_publish_gives_its_claim_back() {
        let mut ledger = ScopeLedger::default();
        let _ = ledger.publish(DEFAULT, ONE, everyone);
        ledger.abandon(DEFAULT, TWO);
        assert_eq!(ledger.builder(DEFAULT), Some(ONE));
        ledger.abandon(DEFAULT, ONE);
        assert_eq!(ledger.builder(DEFAULT), None);
        ledger.abandon(DEFAULT, ONE);
        let scope = {
            ledger.bind_runner(DEFAULT);
            new(ledger.publish(DEFAULT, TWO, everyone))
        };
        ledger.abandon(scope, TWO);
        let publish = ledger.publish(scope, ONE, everyone);
        assert_eq!(publish, Publish::Replace(scope));
    }

    #[test]
    fn a_failed_second_publish_keeps_the_first_ones_claim() {
        let mut ledger = ScopeLedger::default();
        let _ = ledger.publish(DEFAULT, ONE, everyone);
        let _ = ledger.publish(DEFAULT, ONE, everyone);
        ledger.abandon(DEFAULT, ONE);
        assert_eq!(ledger.builder(DEFAULT), Some(ONE));
        let _ = new(ledger.publish(DEFAULT, TWO, everyone));
    }

    #[test]
    fn a_vacant_scope_is_claimed_once_and_nobody_publishes_in_it_meanwhile() {
        let mut ledger = ScopeLedger::default();
        assert!(ledger.claim_vacant(DEFAULT, ONE));
        assert!(!ledger.claim_vacant(DEFAULT, TWO));
        let _ = new(ledger.publish(DEFAULT, TWO, everyone));
        ledger.abandon(DEFAULT, ONE);
        let publish = ledger.publish(DEFAULT, TWO, everyone);
        assert_eq!(publish, Publish::Replace(DEFAULT));
        assert!(!ledger.claim_vacant(DEFAULT, TWO));
        ledger.bind_runner(DEFAULT);
        assert!(!ledger.claim_vacant(DEFAULT, ONE));
        assert!(!ledger.claim_vacant(ScopeId(99), ONE));
    }

    #[test]
    fn a_created_scope_is_open_to_the_first_who_publishes_in_it() {
        let mut ledger = ScopeLedger::default();
        let scope = ledger.create();
        assert_eq!(ledger.builder(scope), None);
        let publish = ledger.publish(scope, TWO, everyone);
        assert_eq!(publish, Publish::Replace(scope));
    }

    #[test]
    fn a_scope_knows_which_generation_it_joined_last() {
        let mut ledger = ScopeLedger::default();
        let scope = ledger.create();
        ledger.join(scope, Key::World, 1);
        ledger.join(scope, Key::World, 2);
        assert_eq!(ledger.joined(scope, &Key::World), Some(2));
        assert_eq!(ledger.joined(DEFAULT, &Key::World), None);
    }

    #[test]
    fn a_dropped_scope_is_gone_and_the_default_one_stays() {
        let mut ledger = ScopeLedger::default();
        let scope = ledger.create();
        ledger.drop_scope(scope);
        let other = new(ledger.publish(scope, ONE, everyone));
        assert_ne!(other, scope);
        ledger.drop_scope(DEFAULT);
        let publish = ledger.publish(DEFAULT, ONE, everyone);
        assert_eq!(publish, Publish::Replace(DEFAULT));
        ledger.abandon(scope, ONE);
        ledger.unbind_runner(scope);
        assert_eq!(ledger.live(scope), 0);
    }

    #[test]
    fn another_instance_gives_out_other_numbers() {
        let mut parent = ScopeLedger::default();
        let mut child = ScopeLedger::with_instance(4711);
        assert_ne!(parent.create(), child.create());
    }

    #[test]
    fn whether_a_builder_lives_is_asked_without_the_lock_and_again_if_it_changed() {
        let scopes = Scopes::default();
        let _ = scopes.with(|ledger| ledger.publish(DEFAULT, ONE, everyone));
        let publish: Result<_, ()> = scopes.publish(DEFAULT, TWO, |thread| {
            // Would deadlock under the lock; the builder changes, so liveness is asked again.
            if thread == ONE {
                scopes.with(|ledger| {
                    ledger.abandon(DEFAULT, ONE);
                    let _ = ledger.publish(DEFAULT, ThreadId(3), everyone);
                });
            }
            Ok(thread == ONE)
        });
        assert_eq!(publish, Ok(Publish::Replace(DEFAULT)));
        assert_eq!(scopes.with(|it| it.builder(DEFAULT)), Some(TWO));
    }

    #[test]
    fn a_builder_that_claims_while_its_predecessor_is_found_dead_keeps_its_claim() {
        let scopes = Scopes::default();
        let _ = scopes.with(|ledger| ledger.publish(DEFAULT, ONE, everyone));
        let three = ThreadId(3);
        let publish: Result<_, ()> = scopes.publish(DEFAULT, TWO, |thread| {
            if thread == ONE {
                let _ = scopes.with(|ledger| ledger.publish(DEFAULT, three, nobody));
            }
            Ok(thread == three)
        });
        let _ = new(publish.expect("nothing fails"));
        assert_eq!(scopes.with(|it| it.builder(DEFAULT)), Some(three));
    }

    #[test]
    fn nothing_is_decided_when_nobody_can_tell_who_lives() {
        let scopes = Scopes::default();
        let _ = scopes.with(|ledger| ledger.publish(DEFAULT, ONE, everyone));
        let publish = scopes.publish(DEFAULT, TWO, |_| Err("no list"));
        assert_eq!(publish, Err("no list"));
        assert_eq!(scopes.with(|it| it.builder(DEFAULT)), Some(ONE));
    }
}
