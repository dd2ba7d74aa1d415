//! All slots behind one lock: single-flight claims, leases, events, snapshots.
//! The lock is a leaf: nothing foreign runs while it is held, and every wait gives it up.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::actor::Actor;
use crate::clock::Clock;
use crate::error::{Error, Owner};
use crate::events::{Event, Ring};
use crate::key::Key;
use crate::lease::{Holder, LeaseId, Leases};
use crate::policy::{Decision, Policy};
use crate::slot::{Origin, Phase, Ready, Running, Slot, Ticket, Work};
use crate::snapshot::{SlotSnapshot, SlotState, Snapshot};
use crate::spec::{diff, Spec};
use crate::sync::{lock, wait_timeout, Condvar, Mutex};
use crate::waitgraph::WaitGraph;

/// How many events are kept.
pub const EVENTS: usize = 1024;

/// What the caller sees in the real process right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// The caller did not look.
    Unknown,
    /// There is no such object.
    Absent,
    /// There is one; this tells it from others.
    Present(u64),
}

/// One request for a key.
#[derive(Debug, Clone)]
pub struct Request {
    /// What for.
    pub key: Key,
    /// With which values.
    pub spec: Spec,
    /// What the caller allows.
    pub policy: Policy,
    /// Who asks.
    pub actor: Actor,
    /// What is really there.
    pub observed: Observed,
    /// How long the caller has waited so far; for events.
    pub waited: Duration,
}

/// What a caller is to do.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Initialise, then publish or fail.
    Lead(Ticket),
    /// Take over what somebody else made, then publish it as adopted, or fail.
    Adopt(Ticket),
    /// Use what exists.
    Join {
        /// Its generation.
        generation: u64,
    },
    /// Go on: this thread leads the key already.
    Nested,
    /// Wait until the registry changes from `epoch`, then ask again.
    Wait {
        /// Who initialises.
        leader: Actor,
        /// Since when, on the registry's clock.
        since: Duration,
        /// What `wait` compares with.
        epoch: u64,
    },
}

pub(crate) struct State {
    pub slots: BTreeMap<Key, Slot>,
    pub leases: HashMap<LeaseId, Key>,
    pub graph: WaitGraph,
    pub events: Ring,
    pub epoch: u64,
    next_id: u64,
}

/// The process's registry of shared state.
pub struct Registry {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Registry {
    /// An empty registry.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            state: Mutex::new(State {
                slots: BTreeMap::new(),
                leases: HashMap::new(),
                graph: WaitGraph::default(),
                events: Ring::new(EVENTS),
                epoch: 0,
                next_id: 1,
            }),
            changed: Condvar::new(),
        }
    }

    /// Time on the registry's clock.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Runs a transition under the lock and wakes whoever waits. `change` must not block.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut State, Duration) -> T) -> T {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let result = change(&mut state, now);
        state.epoch += 1;
        drop(state);
        self.changed.notify_all();
        result
    }

    /// Decides about `request` without waiting.
    ///
    /// Unequal requests are refused at once, also while the other is still initialising. A thread
    /// that leads the key already goes on when its policy is reentrant and is refused as a
    /// deadlock when not.
    pub fn try_acquire(&self, request: &Request) -> Result<Step, Error> {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let noticed = state.notice_out_of_band(request, now);
        let step = state.decide(request, now);
        let decision = match &step {
            Ok(Step::Lead(_)) => Decision::Lead,
            Ok(Step::Adopt(_)) => Decision::Adopt,
            Ok(Step::Join { .. }) => Decision::Join,
            Ok(Step::Nested) => Decision::Nested,
            Ok(Step::Wait { .. }) => Decision::Wait,
            Err(_) => Decision::Refuse,
        };
        // Waiters ask again and again; the first time is the news.
        if decision != Decision::Wait || request.waited.is_zero() {
            let detail = step
                .as_ref()
                .err()
                .map_or_else(String::new, ToString::to_string);
            state.record(request, decision, now, detail);
        }
        let claimed = matches!(step, Ok(Step::Lead(_) | Step::Adopt(_)));
        if claimed || noticed {
            state.epoch += 1;
            drop(state);
            self.changed.notify_all();
        }
        step
    }

    /// Waits until the registry has changed since `epoch`, at most `slice`.
    ///
    /// May return early; the caller asks again in any case. No wake-up is lost: `epoch` is
    /// compared under the lock that every change takes.
    pub fn wait(&self, request: &Request, epoch: u64, slice: Duration) {
        let mut state = lock(&self.state);
        if state.epoch == epoch {
            state.graph.begin(request.actor.thread, request.key.clone());
            state = wait_timeout(&self.changed, state, slice);
            state.graph.end(request.actor.thread);
        }
    }

    /// The error of a caller whose deadline has passed; records it.
    pub fn timed_out(&self, request: &Request) -> Error {
        let now = self.clock.now();
        let mut state = lock(&self.state);
        let owner = state
            .slots
            .get(&request.key)
            .and_then(|slot| slot.owner(now));
        let error = Error::Timeout {
            key: request.key.clone(),
            owner,
            waited: request.waited,
        };
        state.record(request, Decision::Timeout, now, error.to_string());
        error
    }

    /// Makes what the ticket's holder initialised available; returns its generation.
    pub fn publish(
        &self,
        ticket: Ticket,
        spec: Spec,
        origin: Origin,
        identity: u64,
    ) -> Result<u64, Error> {
        self.update(|state, now| {
            let by = state.take_lead(&ticket)?.leader;
            let slot = state.slot(&ticket.key);
            let generation = slot.publish(Ready {
                spec,
                origin,
                identity,
                by: by.clone(),
                since: now,
                leases: Leases::new(),
            });
            state.note(&ticket.key, by, Decision::Publish, now, String::new());
            Ok(generation)
        })
    }

    /// The ticket's holder failed and left nothing behind; the next waiter leads.
    pub fn fail(&self, ticket: Ticket, reason: &str) {
        self.update(|state, now| {
            if let Ok(running) = state.take_lead(&ticket) {
                state.slot(&ticket.key).fail(reason);
                let reason = reason.to_owned();
                state.note(&ticket.key, running.leader, Decision::Fail, now, reason);
            }
        });
    }

    /// The ticket's holder failed and could not undo what it had made.
    pub fn poison(&self, ticket: Ticket, reason: &str) {
        self.update(|state, now| {
            if let Ok(running) = state.take_lead(&ticket) {
                let by = running.leader;
                state.slot(&ticket.key).poison(reason, by.clone(), now);
                state.note(&ticket.key, by, Decision::Poison, now, reason.to_owned());
            }
        });
    }

    /// Takes a lease on each of `keys`, or on none.
    pub fn lease(&self, keys: &[Key], name: &str, actor: &Actor) -> Result<Vec<LeaseId>, Error> {
        self.update(|state, now| {
            let missing = keys
                .iter()
                .find(|key| state.slots.get(key).and_then(Slot::ready).is_none());
            if let Some(key) = missing {
                return Err(Error::NotReady { key: key.clone() });
            }
            let mut taken = Vec::with_capacity(keys.len());
            for key in keys {
                let id = LeaseId(state.fresh_id());
                if let Phase::Ready(ready) = &mut state.slot(key).phase {
                    ready.leases.insert(
                        id,
                        Holder {
                            name: name.to_owned(),
                            actor: actor.clone(),
                            since: now,
                        },
                    );
                }
                state.leases.insert(id, key.clone());
                taken.push(id);
            }
            Ok(taken)
        })
    }

    /// Gives a lease back. False when it was given back before, or its state is gone.
    pub fn release(&self, id: LeaseId) -> bool {
        self.update(|state, _now| {
            let Some(key) = state.leases.remove(&id) else {
                return false;
            };
            state.slot(&key).release(id)
        })
    }

    /// Whether the key can be joined.
    pub fn is_ready(&self, key: &Key) -> bool {
        let state = lock(&self.state);
        state.slots.get(key).and_then(Slot::ready).is_some()
    }

    /// Makes state that nobody holds available to be made anew. False when it is held or changing.
    pub fn forget(&self, key: &Key) -> bool {
        self.update(|state, _now| match state.slots.get_mut(key) {
            Some(slot) if slot.ready().is_some_and(|ready| ready.leases.is_empty()) => {
                slot.clear();
                true
            }
            _ => false,
        })
    }

    /// Drops all bookkeeping of a key that can never be asked for again: its scope is gone.
    pub fn remove(&self, key: &Key) {
        self.update(|state, _now| {
            state.slots.remove(key);
            state.leases.retain(|_, leased| leased != key);
        });
    }

    /// The registry as plain data.
    pub fn snapshot(&self) -> Snapshot {
        let at = self.clock.now();
        let state = lock(&self.state);
        Snapshot {
            at,
            slots: state
                .slots
                .iter()
                .map(|(key, slot)| SlotSnapshot {
                    key: key.clone(),
                    state: slot.state(),
                    generation: slot.generation,
                    waiters: state.graph.waiters(key),
                    failures: slot.failures,
                    last_failure: slot.last_failure.clone(),
                })
                .collect(),
            events: state.events.iter().cloned().collect(),
            dropped_events: state.events.dropped(),
        }
    }
}

impl State {
    pub fn slot(&mut self, key: &Key) -> &mut Slot {
        self.slots.entry(key.clone()).or_default()
    }

    pub fn fresh_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn take_lead(&mut self, ticket: &Ticket) -> Result<Running, Error> {
        let slot = self.slots.get(&ticket.key);
        match slot
            .filter(|slot| slot.is_led_by(ticket))
            .and_then(Slot::running)
        {
            Some(running) => Ok(running.clone()),
            None => Err(Error::StaleTicket {
                key: ticket.key.clone(),
            }),
        }
    }

    pub fn claim(
        &mut self,
        key: &Key,
        actor: &Actor,
        spec: Spec,
        work: Work,
        now: Duration,
    ) -> Ticket {
        let id = self.fresh_id();
        self.slot(key).start(Running {
            ticket: id,
            work,
            leader: actor.clone(),
            since: now,
            spec,
        });
        Ticket {
            key: key.clone(),
            id,
        }
    }

    fn decide(&mut self, request: &Request, now: Duration) -> Result<Step, Error> {
        let (key, actor) = (&request.key, &request.actor);
        let slot = self.slot(key).clone();
        match &slot.phase {
            Phase::Idle => {
                let spec = request.spec.clone();
                let ticket = self.claim(key, actor, spec, Work::Initialise, now);
                Ok(match request.observed {
                    Observed::Present(_) => Step::Adopt(ticket),
                    Observed::Absent | Observed::Unknown => Step::Lead(ticket),
                })
            }
            Phase::Poisoned { reason, by, .. } => Err(Error::Poisoned {
                key: key.clone(),
                reason: reason.clone(),
                by: by.clone(),
            }),
            Phase::Ready(ready) => {
                check(request, &ready.spec, &slot, now)?;
                Ok(Step::Join {
                    generation: slot.generation,
                })
            }
            Phase::Running(running) if running.leader.thread == actor.thread => {
                if request.policy.reentrant {
                    return Ok(Step::Nested);
                }
                Err(self
                    .deadlock(request)
                    .unwrap_or_else(|| Error::Deadlock { cycle: vec![] }))
            }
            Phase::Running(running) => {
                if running.work == Work::Initialise {
                    check(request, &running.spec, &slot, now)?;
                }
                match self.deadlock(request) {
                    Some(error) => Err(error),
                    None => Ok(Step::Wait {
                        leader: running.leader.clone(),
                        since: running.since,
                        epoch: self.epoch,
                    }),
                }
            }
        }
    }

    fn deadlock(&self, request: &Request) -> Option<Error> {
        let leader_of = |key: &Key| Some(self.slots.get(key)?.running()?.leader.thread);
        self.graph
            .cycle(request.actor.thread, &request.key, leader_of)
            .map(|cycle| Error::Deadlock { cycle })
    }

    /// Somebody destroyed or replaced the real object: what is registered describes nothing now.
    fn notice_out_of_band(&mut self, request: &Request, now: Duration) -> bool {
        let Some(ready) = self.slot(&request.key).ready() else {
            return false;
        };
        let gone = match request.observed {
            Observed::Unknown => false,
            Observed::Absent => true,
            Observed::Present(identity) => identity != ready.identity,
        };
        if gone {
            let holders: Vec<Holder> = ready.leases.values().cloned().collect();
            let detail = if holders.is_empty() {
                "changed outside the registry".to_owned()
            } else {
                format!(
                    "changed outside the registry while held by {}",
                    crate::error::list(&holders)
                )
            };
            self.slot(&request.key).clear();
            self.record(request, Decision::OutOfBand, now, detail);
        }
        gone
    }

    fn record(&mut self, request: &Request, decision: Decision, now: Duration, detail: String) {
        let generation = self.slot(&request.key).generation;
        self.events.push(Event {
            seq: 0,
            at: now,
            key: request.key.clone(),
            actor: request.actor.clone(),
            decision,
            generation,
            waited: request.waited,
            detail,
        });
    }

    pub fn note(
        &mut self,
        key: &Key,
        actor: Actor,
        decision: Decision,
        now: Duration,
        detail: String,
    ) {
        let generation = self.slot(key).generation;
        self.events.push(Event {
            seq: 0,
            at: now,
            key: key.clone(),
            actor,
            decision,
            generation,
            waited: Duration::ZERO,
            detail,
        });
    }
}

fn check(request: &Request, existing: &Spec, slot: &Slot, now: Duration) -> Result<(), Error> {
    let key = request.key.clone();
    let Some(owner) = slot.owner(now) else {
        return Ok(());
    };
    let diff = diff(existing, &request.spec);
    if !diff.is_empty() {
        return Err(Error::SpecMismatch { key, diff, owner });
    }
    if request.policy.reuse {
        Ok(())
    } else {
        Err(Error::ReuseForbidden { key, owner })
    }
}

impl Slot {
    fn owner(&self, now: Duration) -> Option<Owner> {
        match &self.phase {
            Phase::Running(running) => Some(Owner {
                leader: running.leader.clone(),
                running: true,
                age: now.saturating_sub(running.since),
                holders: vec![],
            }),
            Phase::Ready(ready) => Some(Owner {
                leader: ready.by.clone(),
                running: false,
                age: now.saturating_sub(ready.since),
                holders: ready.leases.values().cloned().collect(),
            }),
            Phase::Idle | Phase::Poisoned { .. } => None,
        }
    }

    fn state(&self) -> SlotState {
        match &self.phase {
            Phase::Idle => SlotState::Idle,
            Phase::Running(running) => SlotState::Running {
                leader: running.leader.clone(),
                since: running.since,
                spec: running.spec.clone(),
                teardown: running.work == Work::Teardown,
            },
            Phase::Ready(ready) => SlotState::Ready {
                by: ready.by.clone(),
                since: ready.since,
                spec: ready.spec.clone(),
                origin: ready.origin,
                holders: ready.leases.values().cloned().collect(),
            },
            Phase::Poisoned { reason, by, since } => SlotState::Poisoned {
                reason: reason.clone(),
                by: by.clone(),
                since: *since,
            },
        }
    }
}
