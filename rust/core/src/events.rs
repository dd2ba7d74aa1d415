//! The last decisions, in a ring: the source of snapshots, logs and metrics.

use std::collections::VecDeque;
use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::policy::Decision;

/// One decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Counts up from 0 over all keys.
    pub seq: u64,
    /// When, on the registry's clock.
    pub at: Duration,
    /// About what.
    pub key: Key,
    /// Who asked.
    pub actor: Actor,
    /// What was decided.
    pub decision: Decision,
    /// The generation concerned.
    pub generation: u64,
    /// How long the actor had waited for it.
    pub waited: Duration,
    /// Why, in words; may be empty.
    pub detail: String,
}

/// A bounded ring of events.
#[derive(Debug)]
pub struct Ring {
    capacity: usize,
    next: u64,
    events: VecDeque<Event>,
}

impl Ring {
    /// A ring that keeps the last `capacity` events.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            next: 0,
            events: VecDeque::new(),
        }
    }

    /// Adds an event, whose `seq` is set here, and drops the oldest when full.
    pub fn push(&mut self, mut event: Event) {
        event.seq = self.next;
        self.next += 1;
        if self.events.len() == self.capacity {
            self.events.pop_front();
        }
        if self.capacity > 0 {
            self.events.push_back(event);
        }
    }

    /// How many events are no longer kept.
    pub fn dropped(&self) -> u64 {
        self.next - self.events.len() as u64
    }

    /// The events kept, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }
}
