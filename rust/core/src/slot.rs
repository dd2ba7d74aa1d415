//! The state machine of one key. Pure: no lock, no clock, no events; those are the registry's.
//!
//! ```text
//!            claim                publish(ticket)
//!   Idle ────────────▶ Running ─────────────────▶ Ready ──┐
//!    ▲ ▲                 │ │                        │      │ claim for teardown
//!    │ └──── fail ───────┘ └── poison ─▶ Poisoned   │      ▼
//!    │                                     │        │   Running (teardown) ─┐
//!    └──────────── reset ──────────────────┴────────┴───────────────────────┘
//! ```
//!
//! Invariants:
//! - At most one leader: `Running` is entered only from `Idle` or `Ready`, and only its own ticket
//!   leaves it.
//! - `generation` counts published states of the key; it never goes back, also over `reset`.
//! - Leases exist only in `Ready` and name the generation they were taken on, so that one kept
//!   over a change of state frees nothing that is not its own.
//! - Waiters are not part of the slot: they look again whenever it changes.
//!
//! Lock order: none here. The registry's one mutex covers all slots and is a leaf.

use std::time::Duration;

use crate::actor::Actor;
use crate::lease::{LeaseId, Leases};
use crate::spec::Spec;

/// Proof of leading a key; given back by publishing, failing or poisoning.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    pub(crate) key: crate::key::Key,
    pub(crate) id: u64,
}

impl Ticket {
    /// The key it leads.
    pub fn key(&self) -> &crate::key::Key {
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Initialise,
    Teardown,
}

#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub ticket: u64,
    pub work: Work,
    pub leader: Actor,
    pub since: Duration,
    pub spec: Spec,
}

#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub spec: Spec,
    pub origin: Origin,
    pub identity: u64,
    pub by: Actor,
    pub since: Duration,
    pub leases: Leases,
}

#[derive(Debug, Clone, Default)]
pub(crate) enum Phase {
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
    pub phase: Phase,
    pub generation: u64,
    pub failures: u64,
    pub last_failure: Option<String>,
}

impl Slot {
    pub fn running(&self) -> Option<&Running> {
        match &self.phase {
            Phase::Running(running) => Some(running),
            _ => None,
        }
    }

    pub fn ready(&self) -> Option<&Ready> {
        match &self.phase {
            Phase::Ready(ready) => Some(ready),
            _ => None,
        }
    }

    /// Idle, or Ready for teardown, becomes Running. The caller has checked that it may.
    pub fn start(&mut self, running: Running) {
        debug_assert!(!matches!(
            self.phase,
            Phase::Running(_) | Phase::Poisoned { .. }
        ));
        self.phase = Phase::Running(running);
    }

    /// Whether `ticket` is the one that leads now.
    pub fn is_led_by(&self, ticket: &Ticket) -> bool {
        self.running()
            .is_some_and(|running| running.ticket == ticket.id)
    }

    pub fn publish(&mut self, ready: Ready) -> u64 {
        self.generation += 1;
        self.last_failure = None;
        self.phase = Phase::Ready(ready);
        self.generation
    }

    pub fn fail(&mut self, reason: &str) {
        self.failures += 1;
        self.last_failure = Some(reason.to_owned());
        self.phase = Phase::Idle;
    }

    pub fn poison(&mut self, reason: &str, by: Actor, since: Duration) {
        self.failures += 1;
        self.last_failure = Some(reason.to_owned());
        self.phase = Phase::Poisoned {
            reason: reason.to_owned(),
            by,
            since,
        };
    }

    /// Forgets the state. Its leases go with it, whoever holds them.
    pub fn clear(&mut self) {
        self.phase = Phase::Idle;
    }

    pub fn release(&mut self, lease: LeaseId) -> bool {
        match &mut self.phase {
            Phase::Ready(ready) => ready.leases.remove(&lease).is_some(),
            _ => false,
        }
    }
}
