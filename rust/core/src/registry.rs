//! All slots and phases behind one lock, with tickets, events and snapshots. Further operations are
//! in `acquire`, `teardown`, `leases` and `enter`.
//! The lock is a leaf: no foreign code runs while it is held, and every wait releases it.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};
use crate::clock::Clock;
use crate::error::Error;
use crate::events::{self, Event, EventRing};
use crate::key::Key;
use crate::lease::{Broken, LeaseId};
use crate::leases::by_force;
use crate::phases::PhaseLock;
use crate::policy::Decision;
use crate::slot::{Origin, Running, Slot, Ticket};
use crate::snapshot::{SlotSnapshot, Snapshot};
use crate::spec::Spec;
use crate::sync::{lock, AtomicU64, Condvar, Mutex, MutexGuard};
use crate::waitgraph::{Subject, WaitGraph};

pub use crate::request::{Observed, Request, Step};

/// All shared state of a process, and the threads that make it, use it or wait for it.
///
/// Any thread may call any method. Only `wait` and `wait_to_enter` block.
pub struct Registry {
    clock: Arc<dyn Clock>,
    pub(crate) inner: Mutex<Inner>,
    /// A copy of `Inner::slots_changed` that is read without the lock.
    slots_epoch: AtomicU64,
    /// Notified after every change of a slot.
    pub(crate) changed: Condvar,
    /// Notified whenever a visit in line may be able to enter. Not the same as `changed`: threads
    /// that begin to wait for slots notify it, and would wake each other forever.
    pub(crate) moved: Condvar,
}

pub(crate) struct Inner {
    pub slots: BTreeMap<Key, Tracked>,
    pub waits: WaitGraph,
    pub phases: PhaseLock,
    /// The epoch of the last change of any slot.
    pub slots_changed: u64,
    /// The epoch of the last change that may let a visit in line enter.
    pub phases_changed: u64,
    /// Leases whose state is gone, until their holders release them.
    pub broken: BTreeMap<LeaseId, Broken>,
    /// Threads that were last told to look again, and the key and epoch that each contradicted.
    pub doubts: BTreeMap<ThreadId, (Key, u64)>,
    /// Counts changes of any slot or phase.
    pub epoch: u64,
    events: EventRing,
    next_id: u64,
    /// The generation that new slots start with, so that none of a removed slot is used again.
    generation_floor: u64,
}

#[derive(Default)]
pub(crate) struct Tracked {
    pub slot: Slot,
    /// The epoch of the slot's last change.
    pub changed: u64,
}

impl Registry {
    /// An empty registry.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self::with_instance(clock, 0)
    }

    /// As `new`, with numbers of tickets and leases that no other instance uses. So those that a
    /// forked child inherited from its parent's registry release or resolve none of the child's.
    pub fn with_instance(clock: Arc<dyn Clock>, instance: u32) -> Self {
        Self {
            clock,
            inner: Mutex::new(Inner {
                slots: BTreeMap::new(),
                waits: WaitGraph::default(),
                phases: PhaseLock::default(),
                slots_changed: 0,
                phases_changed: 0,
                broken: BTreeMap::new(),
                doubts: BTreeMap::new(),
                epoch: 0,
                events: EventRing::new(events::CAPACITY),
                next_id: (u64::from(instance) << 32) + 1,
                generation_floor: 0,
            }),
            slots_epoch: AtomicU64::new(0),
            changed: Condvar::new(),
            moved: Condvar::new(),
        }
    }

    /// The epoch of the last slot change. Leases that were valid then are valid until the next one.
    ///
    /// Read it before the leases are checked, never after.
    pub fn slots_epoch(&self) -> u64 {
        self.slots_epoch.load(Ordering::Acquire)
    }

    /// Time on the registry's clock.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Makes the state that the ticket's holder initialised available; returns its generation.
    ///
    /// `spec` describes the real state. For `Origin::Adopted` it may differ from the requested
    /// spec. Then the waiters are refused, and so is the leader when it asks again.
    pub fn publish(
        &self,
        ticket: Ticket,
        spec: Spec,
        origin: Origin,
        identity: u64,
    ) -> Result<u64, Error> {
        let detail = spec.to_string();
        let published = self.resolve(&ticket, Decision::Publish, &detail, |slot, now| {
            slot.publish(ticket.id, spec, origin, identity, now)
        });
        published.ok_or(Error::StaleTicket {
            key: ticket.key.clone(),
        })
    }

    /// Records that the ticket's holder failed and left everything as it was before: no state, or
    /// the state whose teardown did not begin. The next waiter leads. False when the ticket is
    /// stale.
    pub fn fail(&self, ticket: Ticket, reason: &str) -> bool {
        self.resolve(&ticket, Decision::Fail, reason, |slot, _| {
            slot.fail(ticket.id, reason)
        })
        .is_some()
    }

    /// Records that the ticket's holder failed and could not undo what it had done: every request
    /// is refused until `reset`. False when the ticket is stale.
    pub fn poison(&self, ticket: Ticket, reason: &str) -> bool {
        self.resolve(&ticket, Decision::Poison, reason, |slot, now| {
            slot.poison(ticket.id, reason, now)
        })
        .is_some()
    }

    /// Records that the state is gone, which breaks the leases left on it. False when the ticket is
    /// stale.
    pub fn end_teardown(&self, ticket: Ticket) -> bool {
        self.resolve(&ticket, Decision::TornDown, "", |slot, _| {
            slot.end(ticket.id)
        })
        .is_some()
    }

    /// Runs a transition that returns the leader; returns the slot's generation after it.
    fn resolve(
        &self,
        ticket: &Ticket,
        decision: Decision,
        detail: &str,
        transition: impl FnOnce(&mut Slot, Duration) -> Option<Actor>,
    ) -> Option<u64> {
        self.update(|inner, now| {
            let slot = &mut inner.slots.get_mut(&ticket.key)?.slot;
            let how = by_force("tore it down", slot.running().map_or("", Running::why));
            let leader = transition(slot, now)?;
            let generation = slot.generation();
            inner.touch(&ticket.key);
            inner.break_leases(&ticket.key, &leader, &how);
            inner.record(Event::new(now, &ticket.key, &leader, decision).detail(detail));
            Some(generation)
        })
    }

    /// Records that this forked process sees its parent's object `identity` and cannot use it.
    /// Requests for `key` are refused while that object is there.
    pub fn inherit(&self, key: &Key, identity: u64) {
        self.update(|inner, _| inner.slot_mut(key).inherit(identity));
    }

    /// Whether the key can be joined.
    pub fn is_ready(&self, key: &Key) -> bool {
        self.lock()
            .slot(key)
            .is_some_and(|slot| slot.ready().is_some())
    }

    /// Every key that can be joined.
    pub fn ready_keys(&self) -> Vec<Key> {
        let inner = self.lock();
        let ready = inner.slots.iter();
        ready
            .filter(|(_, it)| it.slot.ready().is_some())
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// The names of the holders of `key`, oldest first.
    pub fn holders(&self, key: &Key) -> Vec<String> {
        let inner = self.lock();
        let held = inner.slot(key).map(Slot::holders).unwrap_or_default();
        held.into_iter().map(|it| it.name).collect()
    }

    /// The registry as plain data.
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        Snapshot {
            at: self.now(),
            slots: inner
                .slots
                .iter()
                .map(|(key, it)| SlotSnapshot::new(key, &it.slot, inner.waits.waiters(key)))
                .collect(),
            visits: inner.phases.iter().cloned().collect(),
            events: inner.events.iter().cloned().collect(),
            dropped_events: inner.events.dropped(),
        }
    }

    /// The events kept whose number is `seq` or more, oldest first; for readers that poll.
    pub fn events_since(&self, seq: u64) -> Vec<Event> {
        self.lock().events.since(seq).cloned().collect()
    }

    /// Wakes every thread that waits or is about to wait. Each looks again and, if nothing changed,
    /// continues to wait.
    pub fn wake_all(&self) {
        self.update(|inner, _| inner.touch_all());
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The only way to change anything; wakes the threads that wait for the change.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Inner, Duration) -> T) -> T {
        self.update_timeless(|inner| change(inner, self.now()))
    }

    /// As `update`, for a change that records no event.
    pub(crate) fn update_timeless<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let epoch = inner.epoch;
        let result = change(&mut inner);
        let (changed, moved) = (inner.slots_changed > epoch, inner.phases_changed > epoch);
        if changed {
            // Stored while the lock is held: a thread that sees the change sees the new epoch.
            self.slots_epoch
                .store(inner.slots_changed, Ordering::Release);
        }
        drop(inner);
        if changed {
            self.changed.notify_all();
        }
        if moved {
            self.moved.notify_all();
        }
        result
    }
}

impl Inner {
    pub fn slot(&self, key: &Key) -> Option<&Slot> {
        Some(&self.slots.get(key)?.slot)
    }

    pub fn tracked(&mut self, key: &Key) -> &mut Tracked {
        let generation = self.generation_floor;
        self.slots.entry(key.clone()).or_insert_with(|| Tracked {
            slot: Slot::new(generation),
            changed: 0,
        })
    }

    pub fn slot_mut(&mut self, key: &Key) -> &mut Slot {
        &mut self.tracked(key).slot
    }

    /// Marks the slot of `key` as changed, so that its waiters look again.
    pub fn touch(&mut self, key: &Key) {
        self.epoch += 1;
        let epoch = self.epoch;
        self.slots_changed = epoch;
        self.tracked(key).changed = epoch;
    }

    /// Marks everything as changed.
    fn touch_all(&mut self) {
        self.epoch += 1;
        self.slots_changed = self.epoch;
        self.phases_changed = self.epoch;
        for tracked in self.slots.values_mut() {
            tracked.changed = self.epoch;
        }
    }

    /// Removes the slot of `key` and all that is recorded about it.
    pub fn remove(&mut self, key: &Key) {
        if let Some(removed) = self.slots.remove(key) {
            self.epoch += 1;
            self.slots_changed = self.epoch;
            self.generation_floor = self.generation_floor.max(removed.slot.generation());
        }
    }

    /// A new number; tickets, leases and visits share them.
    pub fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Records an event, with the generation that its key has now.
    pub fn record(&mut self, event: Event) {
        let generation = match &event.subject {
            Subject::Key(key) => self.slot(key).map_or(0, Slot::generation),
            Subject::Phase(_) => 0,
        };
        self.events.push(event.generation(generation));
    }

    /// Records that `actor` is refused `key`, and returns the error.
    pub fn refuse(&mut self, key: &Key, actor: &Actor, error: Error, now: Duration) -> Error {
        let event = Event::new(now, key, actor, Decision::Refuse);
        self.record(event.detail(error.to_string()));
        error
    }
}
