//! The registry at one moment, as plain data for people and tools.
//! No decision may depend on a snapshot: it is outdated when it is read.

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
    /// There is no state.
    Idle,
    /// A leader initialises it or tears it down.
    Running {
        /// The leader.
        leader: Actor,
        /// When it began.
        since: Duration,
        /// The requested spec or, during a teardown, the spec of the state.
        spec: Spec,
        /// Whether it is being torn down.
        teardown: bool,
    },
    /// It can be joined.
    Ready {
        /// The actor that made it.
        by: Actor,
        /// When it was published.
        since: Duration,
        /// Its spec.
        spec: Spec,
        /// Whether the registry made it.
        origin: Origin,
        /// Its holders.
        holders: Vec<Holder>,
    },
    /// A leader failed and left it incomplete; only a reset helps.
    Poisoned {
        /// Why the leader failed.
        reason: String,
        /// The leader that failed.
        by: Actor,
        /// When it failed.
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
    /// How many states were published for the key.
    pub generation: u64,
    /// The identity of its live object, while Ready.
    pub identity: Option<u64>,
    /// How many threads wait for it.
    pub waiters: usize,
    /// Those threads.
    pub waiting: Vec<Actor>,
    /// How many leaders failed.
    pub failures: u64,
    /// Why the last one failed, unless one has succeeded since.
    pub last_failure: Option<String>,
}

/// The whole registry.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// When it was taken, on the registry's clock.
    pub at: Duration,
    /// The slots, by key.
    pub slots: Vec<SlotSnapshot>,
    /// The visits that are in a phase or in line for one, by arrival.
    pub visits: Vec<Visit>,
    /// The last events, oldest first.
    pub events: Vec<Event>,
    /// How many events are no longer kept.
    pub dropped_events: u64,
}

impl Snapshot {
    /// The slot of `key`, if it was ever requested.
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
