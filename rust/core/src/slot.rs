//! The state machine of one key. Pure: no lock, no clock, no events; those are the registry's.
//! Must never decide: `rules` says what a request gets.
//!
//! ```text
//! from        by           to
//! Idle        lead         Running (build, adopt)
//! Running     publish      Ready, one generation on
//!             fail         what was there before: Idle, or Ready for a teardown
//!             poison       Poisoned
//!             end          Idle
//! Ready       tear_down    Running (teardown)
//!             clear        Idle: forgotten, reset, or changed behind our back
//! Poisoned    clear        Idle: reset
//! ```
//!
//! Invariants:
//! - At most one leader: `Running` is entered only from `Idle` or `Ready`, and only its own ticket
//!   leaves it.
//! - `fail` puts back what was there before the claim; `poison` says that this is not possible, and
//!   then only `clear` helps.
//! - `generation` counts published states of the key; it never goes back, also over `clear`.
//! - Leases exist only in a Ready state, also while that is torn down, and go with it, so that one
//!   kept over a change of state frees nothing that is not its own. Those that were not given back
//!   are broken: kept aside until their holder asks.
//! - Waiters are not part of the slot: they look again whenever it changes.
//!
//! Lock order: none here. The registry's one mutex covers all slots and is a leaf: nothing else is
//! locked, and nothing foreign but the clock is called, while it is held.

use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::lease::{Holder, LeaseId, Leases};
use crate::spec::Spec;

/// Proof of leading a key; given back by publishing, failing, poisoning or ending a teardown.
///
/// It cannot be cloned: a claim is resolved once. A ticket that is dropped leaves its key Running,
/// so whoever has one resolves it on every path, errors and panics included; `LeadGuard` does.
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

/// Who made the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A leader of the registry.
    Created,
    /// Somebody else; the registry never destroys it.
    Adopted,
}

/// What a leader does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Makes the state.
    Build,
    /// Takes over what somebody else made.
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
    /// With what comes back when the teardown fails.
    Teardown(Box<Ready>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Running {
    pub ticket: u64,
    pub task: Task,
    pub leader: Actor,
    pub since: Duration,
    /// Some waiter was told that this takes long.
    pub called_slow: bool,
}

impl Running {
    pub fn purpose(&self) -> Purpose {
        match self.task {
            Task::Build(_) => Purpose::Build,
            Task::Adopt(_) => Purpose::Adopt,
            Task::Teardown(_) => Purpose::Teardown,
        }
    }

    /// What is wanted or, while it is torn down, what was there.
    pub fn spec(&self) -> &Spec {
        match &self.task {
            Task::Build(spec) | Task::Adopt(spec) => spec,
            Task::Teardown(ready) => &ready.spec,
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
    /// Leases that went with their state and were not given back; the registry collects them.
    orphans: Leases,
    /// What a forked process got from its parent and cannot use; see `Registry::inherit`.
    inherited: Option<u64>,
}

impl Slot {
    /// An idle slot whose first publish is `generation` plus one.
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

    /// The identity of an object that came over a fork.
    pub fn inherited(&self) -> Option<u64> {
        self.inherited
    }

    pub fn inherit(&mut self, identity: u64) {
        self.inherited = Some(identity);
    }

    /// The leases that the last transition broke; each is handed out once.
    pub fn take_orphans(&mut self) -> Leases {
        std::mem::take(&mut self.orphans)
    }

    /// True for the first caller during a lead.
    pub fn call_slow(&mut self) -> bool {
        match &mut self.state {
            State::Running(running) => !std::mem::replace(&mut running.called_slow, true),
            _ => false,
        }
    }

    /// Whether the lease is good: held, and on state that is not being torn down.
    pub fn holds(&self, id: LeaseId) -> bool {
        self.ready()
            .is_some_and(|ready| ready.leases.contains_key(&id))
    }

    /// Who tears down, by force, the state that the lease is on.
    pub fn breaks(&self, id: LeaseId) -> Option<&Actor> {
        match &self.running()?.task {
            Task::Teardown(ready) => ready.leases.contains_key(&id),
            Task::Build(_) | Task::Adopt(_) => false,
        }
        .then_some(&self.running()?.leader)
    }

    pub fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            _ => None,
        }
    }

    /// What can be joined.
    pub fn ready(&self) -> Option<&Ready> {
        match &self.state {
            State::Ready(ready) => Some(ready),
            _ => None,
        }
    }

    /// Who holds the state, also while it is torn down.
    pub fn holders(&self) -> Vec<Holder> {
        let ready = match &self.state {
            State::Ready(ready) => ready,
            State::Running(Running {
                task: Task::Teardown(ready),
                ..
            }) => ready,
            _ => return vec![],
        };
        ready.leases.values().cloned().collect()
    }

    /// Idle becomes Running. False, and nothing changed, from anywhere else.
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

    /// Ready becomes Running, its leases kept until the end. False from anywhere else.
    pub fn tear_down(&mut self, ticket: u64, leader: Actor, now: Duration) -> bool {
        match std::mem::take(&mut self.state) {
            State::Ready(ready) => {
                let task = Task::Teardown(Box::new(ready));
                self.lead(ticket, leader, task, now)
            }
            other => {
                self.state = other;
                false
            }
        }
    }

    /// Running becomes Ready. All four that resolve a ticket return the leader, or nothing, with
    /// nothing changed, when the ticket does not lead.
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

    /// Running becomes what it was before: Idle or, for a teardown, Ready with its leases.
    pub fn fail(&mut self, ticket: u64, reason: &str) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.failures += 1;
        self.last_failure = Some(reason.to_owned());
        if let Task::Teardown(ready) = running.task {
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

    /// Running becomes Idle: nothing is there any more.
    pub fn end(&mut self, ticket: u64) -> Option<Actor> {
        let running = self.take_running(ticket)?;
        self.orphan(running.task);
        Some(running.leader)
    }

    /// Ready or Poisoned becomes Idle; leases go with it. False, and nothing changed, otherwise.
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

    /// False, and nothing changed, unless Ready.
    pub fn lease(&mut self, id: LeaseId, holder: Holder) -> bool {
        match &mut self.state {
            State::Ready(ready) => ready.leases.insert(id, holder).is_none(),
            _ => false,
        }
    }

    /// Nothing when the lease is not held here, or no longer.
    pub fn release(&mut self, id: LeaseId) -> Option<Holder> {
        match &mut self.state {
            State::Ready(ready) => ready.leases.remove(&id),
            State::Running(Running {
                task: Task::Teardown(ready),
                ..
            }) => ready.leases.remove(&id),
            _ => None,
        }
    }

    fn orphan(&mut self, task: Task) {
        if let Task::Teardown(ready) = task {
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
