//! A bounded record of every decision: the source of snapshots, logs, traces and metrics.
//! Must never grow without limit or lose an event silently: it counts those that it drops.

use std::collections::VecDeque;
use std::time::Duration;

use crate::actor::Actor;
use crate::policy::Decision;
use crate::waitgraph::Subject;

/// How many events a registry keeps.
pub const CAPACITY: usize = 1024;

/// One decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Counts the registry's events from 0, without gaps.
    pub seq: u64,
    /// When it was decided, on the registry's clock.
    pub at: Duration,
    /// The key or the phase that it concerns.
    pub subject: Subject,
    /// The actor that it concerns.
    pub actor: Actor,
    /// What was decided.
    pub decision: Decision,
    /// The key's generation at that time; 0 if it was never published, and for phases.
    pub generation: u64,
    /// How long the actor had waited for the decision.
    pub waited: Duration,
    /// Further facts, as text for people.
    pub detail: String,
}

impl Event {
    /// An event for which the actor did not wait; the ring numbers it.
    pub fn new(
        at: Duration,
        subject: impl Into<Subject>,
        actor: &Actor,
        decision: Decision,
    ) -> Self {
        Self {
            seq: 0,
            at,
            subject: subject.into(),
            actor: actor.clone(),
            decision,
            generation: 0,
            waited: Duration::ZERO,
            detail: String::new(),
        }
    }

    /// Sets the generation that it concerns.
    #[must_use]
    pub fn generation(mut self, generation: u64) -> Self {
        self.generation = generation;
        self
    }

    /// Sets how long the actor had waited.
    #[must_use]
    pub fn waited(mut self, waited: Duration) -> Self {
        self.waited = waited;
        self
    }

    /// Sets the further facts.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
}

/// The latest events, oldest first.
#[derive(Debug)]
pub struct EventRing {
    events: VecDeque<Event>,
    capacity: usize,
    next_seq: u64,
}

impl EventRing {
    /// A ring that keeps the latest `capacity` events.
    pub fn new(capacity: usize) -> Self {
        Self {
            events: VecDeque::new(),
            capacity,
            next_seq: 0,
        }
    }

    /// Numbers and keeps an event, and drops the oldest one if the ring is full.
    pub fn push(&mut self, mut event: Event) {
        event.seq = self.next_seq;
        self.next_seq += 1;
        self.events.push_back(event);
        if self.events.len() > self.capacity {
            self.events.pop_front();
        }
    }

    /// The events that are kept, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Event> {
        self.events.iter()
    }

    /// The events kept whose number is `seq` or more.
    pub fn since(&self, seq: u64) -> impl Iterator<Item = &Event> {
        let skip = self.events.partition_point(|event| event.seq < seq);
        self.events.iter().skip(skip)
    }

    /// How many events were dropped.
    pub fn dropped(&self) -> u64 {
        self.next_seq - self.events.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::ThreadId;
    use crate::key::Key;

    fn ring(capacity: usize, pushed: u64) -> EventRing {
        let mut ring = EventRing::new(capacity);
        let actor = Actor {
            thread: ThreadId(1),
            thread_name: "t1".into(),
            runner: None,
        };
        for second in 0..pushed {
            let at = Duration::from_secs(second);
            ring.push(Event::new(at, &Key::World, &actor, Decision::Join));
        }
        ring
    }

    #[test]
    fn a_full_ring_drops_the_oldest_and_counts_them() {
        let ring = ring(3, 5);
        let kept: Vec<_> = ring.iter().map(|event| event.seq).collect();
        assert_eq!(kept, [2, 3, 4]);
        assert_eq!(ring.dropped(), 2);
    }

    #[test]
    fn events_can_be_read_from_a_number_on() {
        let ring = ring(3, 5);
        let from = |seq| ring.since(seq).map(|event| event.seq).collect::<Vec<_>>();
        assert_eq!(from(0), [2, 3, 4]);
        assert_eq!(from(4), [4]);
        assert!(from(5).is_empty());
    }

    #[test]
    fn a_full_ring_only_counts() {
        let ring = ring(0, 4);
        assert_eq!(ring.iter().count(), 0);
        assert_eq!(ring.dropped(), 4);
    }
}
