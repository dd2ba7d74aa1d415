//! What the registry looks like at one moment, as plain data for people and tools.
//! Must never be what a decision rests on: it is old when it is read.

use std::time::Duration;

use crate::actor::Actor;
use crate::events::Event;
use crate::key::Key;
use crate::lease::Holder;
use crate::phases::Visit;
use crate::slot::{Origin, Purpose, Slot, State};
use crate::spec::Spec;

/// The state of one slot.
#[derive(Debug, Clone, PartialEq)]
pub enum SlotState {
    /// Nothing is there.
    Idle,
    /// A leader initialises it or tears it down.
    Running {
        /// Who.
        leader: Actor,
        /// Since when.
        since: Duration,
        /// For what.
        spec: Spec,
        /// Whether it is being torn down.
        teardown: bool,
    },
    /// It can be joined.
    Ready {
        /// Who made it.
        by: Actor,
        /// Since when.
        since: Duration,
        /// For what.
        spec: Spec,
        /// Whether the registry made it.
        origin: Origin,
        /// Who holds it.
        holders: Vec<Holder>,
    },
    /// Half-made; only a reset helps.
    Poisoned {
        /// What went wrong.
        reason: String,
        /// Who was making it.
        by: Actor,
        /// Since when.
        since: Duration,
    },
}

/// One slot.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotSnapshot {
    /// Its key.
    pub key: Key,
    /// Its state.
    pub state: SlotState,
    /// How many states it has had.
    pub generation: u64,
    /// Which live object it is, while Ready.
    pub identity: Option<u64>,
    /// How many threads wait for it.
    pub waiters: usize,
    /// Which threads these are.
    pub waiting: Vec<Actor>,
    /// How many leaders failed.
    pub failures: u64,
    /// Why the last one failed, unless one has succeeded since.
    pub last_failure: Option<String>,
}

/// The whole registry.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// When, on the registry's clock.
    pub at: Duration,
    /// The slots, by key.
    pub slots: Vec<SlotSnapshot>,
    /// Who is in a phase or in line for one, by arrival.
    pub visits: Vec<Visit>,
    /// The last events, oldest first.
    pub events: Vec<Event>,
    /// How many events are no longer kept.
    pub dropped_events: u64,
}

impl Snapshot {
    /// The slot of `key`, once it was asked for.
    pub fn slot(&self, key: &Key) -> Option<&SlotSnapshot> {
        self.slots.iter().find(|slot| slot.key == *key)
    }
}

impl SlotSnapshot {
    pub(crate) fn new(key: &Key, slot: &Slot, waiting: Vec<Actor>) -> Self {
        Self {
            key: key.clone(),
            state: SlotState::new(slot),
            generation: slot.generation(),
            identity: slot.ready().map(|ready| ready.identity),
            waiters: waiting.len(),
            waiting,
            failures: slot.failures(),
            last_failure: slot.last_failure().map(Into::into),
        }
    }
}

impl SlotState {
    fn new(slot: &Slot) -> Self {
        match slot.state().clone() {
            State::Idle => Self::Idle,
            State::Running(running) => Self::Running {
                spec: running.spec().clone(),
                teardown: running.purpose() == Purpose::Teardown,
                leader: running.leader,
                since: running.since,
            },
            State::Ready(ready) => Self::Ready {
                by: ready.by,
                since: ready.since,
                spec: ready.spec,
                origin: ready.origin,
                holders: slot.holders(),
            },
            State::Poisoned { reason, by, since } => Self::Poisoned { reason, by, since },
        }
    }
}
