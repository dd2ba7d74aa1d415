//! The state machine of one key. Pure: no lock, no clock, no events; the registry has those.
//! Must never decide: `rules` decides about requests.
//!
//! ```text
//! from        by           to
//! Idle        lead         Running (build, adopt)
//! Running     publish      Ready, in the next generation
//!             fail         the state before: Idle or, for a teardown, Ready
//!             poison       Poisoned
//!             end          Idle
//! Ready       tear_down    Running (teardown)
//!             forget       Idle: forgotten, reset, or changed outside the registry
//! Poisoned    forget       Idle: reset
//! ```
//!
//! Invariants:
//! - At most one leader: `Running` is entered only from `Idle` or `Ready`, and only its own ticket
//!   leaves it.
//! - `fail` restores the state before the claim. `poison` records that this is not possible, and
//!   then only `forget` helps.
//! - `generation` counts published states of the key; it never decreases, not even by `forget`.
//! - Leases exist only in a Ready state, also while it is torn down, and end with it. So a lease
//!   that is kept over a change of state releases nothing of the later state. Leases that were not
//!   released are broken: they are kept apart for their holders.
//! - Waiters are not part of the slot: they look again whenever it changes.
//!
//! Lock order: none here. The registry's one mutex covers all slots and is a leaf: while it is
//! held, nothing else is locked, and no foreign code but the clock is called.

use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::lease::{Holder, LeaseId, Leases};
use crate::spec::Spec;

/// Proof of leading a key; resolved by publishing, failing, poisoning or ending a teardown.
///
/// It cannot be cloned: a claim is resolved once. A ticket that is dropped leaves its key Running.
/// So its holder resolves it on every path, errors and panics included, as `LeadGuard` does.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a ticket that is dropped leaves its key Running"]
pub struct Ticket {
    pub(crate) key: Key,
    pub(crate) id: u64,
}

impl Ticket {
    /// The key it leads.
    pub fn key(&self) -> &Key {
        &self.key
    }
}

/// Where the state comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A leader of the registry made it.
    Created,
    /// Other code made it; the registry never destroys it.
    Adopted,
}

/// What a leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Makes the state.
    Build,
    /// Takes over state that other code made.
    Adopt,
    /// Destroys the state.
    Teardown,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ready {
    pub spec: Spec,
    pub origin: Origin,
    pub identity: u64,
    pub by: Actor,
    pub since: Duration,
    pub leases: Leases,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Task {
    Build(Spec),
    Adopt(Spec),
    Teardown {
        /// The state to restore when the teardown fails.
        before: Box<Ready>,
        /// What a forced one was begun for, in words; empty if that was not said.
        why: String,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Running {
    pub ticket: u64,
    pub task: Task,
    pub leader: Actor,
    pub since: Duration,
    /// Whether the leader was already recorded as slow.
    pub called_slow: bool,
}

impl Running {
    pub fn purpose(&self) -> Purpose {
        match self.task {
            Task::Build(_) => Purpose::Build,
            Task::Adopt(_) => Purpose::Adopt,
            Task::Teardown { .. } => Purpose::Teardown,
        }
    }

    /// What a forced teardown was begun for, in words; empty if that was not said.
    pub fn why(&self) -> &str {
        match &self.task {
            Task::Teardown { why, .. } => why,
            Task::Build(_) | Task::Adopt(_) => "",
        }
    }

    /// The requested spec or, during a teardown, the spec of the state.
    pub fn spec(&self) -> &Spec {
        match &self.task {
            Task::Build(spec) | Task::Adopt(spec) => spec,
            Task::Teardown { before, .. } => &before.spec,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) enum State {
    #[default]
    Idle,
    Running(Running),
    Ready(Ready),
    Poisoned {
        reason: String,
        by: Actor,
        since: Duration,
    },
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Slot {
    state: State,
    generation: u64,
    failures: u64,
    last_failure: Option<String>,
    /// Leases that were not released before their state ended; the registry collects them.
    orphans: Leases,
    /// The parent's object that this forked process cannot use; see `Registry::inherit`.
    inherited: Option<u64>,
}

impl Slot {
    /// An idle slot whose first published generation is `generation` plus one.
    pub fn new(generation: u64) -> Self {
        Self {
            generation,
            ..Self::default()
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many leaders failed.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Why the last one failed, unless one has succeeded since.
    pub fn last_failure(&self) -> Option<&str> {
        self.last_failure.as_deref()
    }

    /// The identity of an object that came through a fork.
    pub fn inherited(&self) -> Option<u64> {
        self.inherited
    }

    pub fn inherit(&mut self, identity: u64) {
        self.inherited = Some(identity);
    }

    /// The leases that the last transition broke; each is returned once.
    pub fn take_orphans(&mut self) -> Leases {
        std::mem::take(&mut self.orphans)
    }

    /// True at the first call during a lead.
    pub fn call_slow(&mut self) -> bool {
        match &mut self.state {
            State::Running(running) => !std::mem::replace(&mut running.called_slow, true),
            _ => false,
        }
    }

    /// Whether the lease is valid: held, and on state that is not being torn down.
    pub fn holds(&self, id: LeaseId) -> bool {
        self.ready()
            .is_some_and(|ready| ready.leases.contains_key(&id))
    }

    /// The actor that tears down, by force, the state under the lease, and why.
    pub fn breaks(&self, id: LeaseId) -> Option<(&Actor, &str)> {
        let running = self.running()?;
        match &running.task {
            Task::Teardown { before, why } if before.leases.contains_key(&id) => {
                Some((&running.leader, why))
            }
            _ => None,
        }
    }

    pub fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            _ => None,
        }
    }

    /// The state that can be joined.
    pub fn ready(&self) -> Option<&Ready> {
        match &self.state {
            State::Ready(ready) => Some(ready),
            _ => None,
        }
    }

    /// The holders of the state, also while it is torn down.
    pub fn holders(&self) -> Vec<Holder> {
        let ready = match &self.state {
            State::Ready(ready) => ready,
            State::Running(Running {
                task: Task::Teardown { before: ready, .. },
                ..
            }) => ready,
            _ => return vec![],
        };
        ready.leases.values().cloned().collect()
    }

    /// Idle becomes Running. From any other state: false, and nothing changes.
    pub fn lead(&mut self, ticket: u64, leader: Actor, task: Task, now: Duration) -> bool {
        let idle = self.state == State::Idle;
        if idle {
            self.state = State::Running(Running {
                ticket,
                task,
                leader,
                since: now,
                called_slow: false,
            });
        }
        idle
    }

    /// Ready becomes Running and keeps its leases until the end. False from any other state.
    pub fn tear_down(&mut self, ticket: u64, leader: Actor, why: &str, now: Duration) -> bool {
        match std::mem::take(&mut self.state) {
            State::Ready(ready) => {
                let (before, why) = (Box::new(ready), why.to_owned());
                self.lead(ticket, leader, Task::Teardown { before, why }, now)
            }
            other => {
                self.state = other;
                false
            }
        }
    }

    /// Running becomes Ready. Each of the four methods that resolve a ticket returns the leader. If
    /// the ticket does not lead, it returns None and changes nothing.
    pub fn publish(
        &mut self,
        ticket: u64,
        spec: Spec,
        origin: Origin,
        identity: u64,
        now: Duration,
    ) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.generation += 1;
        self.last_failure = None;
        self.state = State::Ready(Ready {
            spec,
            origin,
            identity,
            by: running.leader.clone(),
            since: now,
            leases: Leases::new(),
        });
        Some(running.leader)
    }

    /// Running becomes the state before it: Idle or, for a teardown, Ready with its leases.
    pub fn fail(&mut self, ticket: u64, reason: &str) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.failures += 1;
        self.last_failure = Some(reason.to_owned());
        if let Task::Teardown { before: ready, .. } = running.task {
            self.state = State::Ready(*ready);
        }
        Some(running.leader)
    }

    /// Running becomes Poisoned.
    pub fn poison(&mut self, ticket: u64, reason: &str, now: Duration) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.failures += 1;
        self.last_failure = Some(reason.to_owned());
        self.orphan(running.task);
        self.state = State::Poisoned {
            reason: reason.to_owned(),
            by: running.leader.clone(),
            since: now,
        };
        Some(running.leader)
    }

    /// Running becomes Idle: the state is gone.
    pub fn end(&mut self, ticket: u64) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.orphan(running.task);
        Some(running.leader)
    }

    /// Ready or Poisoned becomes Idle; its leases end. Otherwise false, and nothing changes.
    pub fn forget(&mut self) -> bool {
        match std::mem::take(&mut self.state) {
            State::Ready(ready) => self.orphans.extend(ready.leases),
            State::Poisoned { .. } => {}
            other => {
                self.state = other;
                return false;
            }
        }
        self.last_failure = None;
        true
    }

    /// Adds a lease. False, and nothing changes, unless Ready.
    pub fn lease(&mut self, id: LeaseId, holder: Holder) -> bool {
        match &mut self.state {
            State::Ready(ready) => ready.leases.insert(id, holder).is_none(),
            _ => false,
        }
    }

    /// Releases a lease. None when it is not held here, or no longer.
    pub fn release(&mut self, id: LeaseId) -> Option<Holder> {
        match &mut self.state {
            State::Ready(ready) => ready.leases.remove(&id),
            State::Running(Running {
                task: Task::Teardown { before: ready, .. },
                ..
            }) => ready.leases.remove(&id),
            _ => None,
        }
    }

    fn orphan(&mut self, task: Task) {
        if let Task::Teardown { before: ready, .. } = task {
            self.orphans.extend(ready.leases);
        }
    }

    fn take_running(&mut self, ticket: u64) -> Option<Running> {
        match std::mem::take(&mut self.state) {
            State::Running(running) if running.ticket == ticket => Some(running),
            other => {
                self.state = other;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
