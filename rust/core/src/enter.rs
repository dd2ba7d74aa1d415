//! Entering a phase: which thread enters now, which one waits, which waits would never end.
//! No foreign code runs under the lock; the rules of the line are in `phases`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};
use crate::error::Error;
use crate::events::Event;
use crate::key::Key;
use crate::phases::{Access, RunnerId, Visit, VisitId};
use crate::policy::Decision;
use crate::registry::{Inner, Registry};
use crate::sync;
use crate::waitgraph::{find_cycle, Edge, Subject, Wait};

/// The result of an attempt to enter.
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub enum Entry {
    /// The visit is inside; call `leave` when done.
    Inside,
    /// Call `wait_to_enter`, then `try_enter` again; or call `leave`.
    Wait {
        /// The actors inside a conflicting phase; empty when only the line blocks the visit.
        inside: Vec<Actor>,
        /// The epoch to pass to `wait_to_enter`.
        epoch: u64,
    },
}

impl Registry {
    /// Gets in line for a phase and enters if nothing conflicts. The caller ends the visit with
    /// `leave` on every path; a refused visit has ended already.
    pub fn arrive(
        &self,
        access: impl Into<Access>,
        actor: &Actor,
    ) -> Result<(VisitId, Entry), Error> {
        self.arrive_in_step(access, None, actor)
    }

    /// As `arrive`, within a runner's method `step`.
    pub fn arrive_in_step(
        &self,
        access: impl Into<Access>,
        step: Option<Arc<str>>,
        actor: &Actor,
    ) -> Result<(VisitId, Entry), Error> {
        let access = access.into();
        self.update(|inner, now| {
            let id = VisitId(inner.fresh_id());
            // The common case of nearly every step of every runner: nothing conflicts.
            let is_free = inner.phases.is_free(access, actor.thread);
            inner
                .phases
                .arrive(id, access, step, actor.clone(), now, is_free);
            if is_free {
                return Ok((id, Entry::Inside));
            }
            let entry = inner.enter(id, now)?;
            if let Entry::Wait { inside, .. } = &entry {
                let detail = if inside.is_empty() {
                    "in line".to_owned()
                } else {
                    format!("for {}", crate::error::join(inside, ", "))
                };
                let event = Event::new(now, &access, actor, Decision::Wait);
                inner.record(event.detail(detail));
                // A thread that waits for this one may now overtake those that this one waits for.
                inner.touch_phases();
            }
            Ok((id, entry))
        })
    }

    /// Enters if nothing conflicts now. After an error the visit has ended.
    pub fn try_enter(&self, visit: VisitId) -> Result<Entry, Error> {
        self.update(|inner, now| inner.enter(visit, now))
    }

    /// Waits until a change after `epoch` may let the visit enter; at most `slice`.
    ///
    /// May return early. No wake-up is lost: `epoch` is compared under the lock that every change
    /// takes.
    pub fn wait_to_enter(&self, visit: VisitId, epoch: u64, slice: Duration) {
        let inner = self.lock();
        let queued = inner.phases.get(visit).is_some_and(|visit| !visit.inside);
        if queued && inner.phases_changed <= epoch {
            drop(sync::wait_timeout(&self.moved, inner, slice));
        }
    }

    /// The visits of threads other than `thread` that read or change `runner` now.
    pub fn inside_of(&self, runner: RunnerId, thread: ThreadId) -> Vec<Visit> {
        let close = Access {
            phase: crate::phases::Phase::Load,
            runner: Some(runner),
            target: None,
        };
        let inner = self.lock();
        let inside = inner.phases.occupants(close, thread);
        let about = inside
            .filter(|it| it.access.runner == Some(runner) || it.access.target == Some(runner));
        about.cloned().collect()
    }

    /// Ends a visit, inside or in line. False when it had already ended.
    pub fn leave(&self, visit: VisitId) -> bool {
        self.update_timeless(|inner| inner.leave(visit))
    }

    /// Ends a visit whose deadline has passed in line; returns the error that says why.
    pub fn phase_timed_out(&self, visit: VisitId, waited: Duration) -> Error {
        self.update(|inner, now| {
            let Some(it) = inner.phases.get(visit).cloned() else {
                return Error::VisitOver;
            };
            let inside = inner.in_the_way(it.access, it.actor.thread);
            inner.leave(visit);
            let error = Error::PhaseTimeout {
                access: it.access,
                inside,
                waited,
            };
            let event = Event::new(now, &it.access, &it.actor, Decision::Timeout);
            inner.record(event.waited(waited).detail(error.to_string()));
            error
        })
    }
}

impl Inner {
    fn enter(&mut self, id: VisitId, now: Duration) -> Result<Entry, Error> {
        let Some(visit) = self.phases.get(id).cloned() else {
            return Err(Error::VisitOver);
        };
        let inside = self.in_the_way(visit.access, visit.actor.thread);
        if inside.is_empty() {
            if !visit.inside && self.is_its_turn(id, visit.actor.thread) {
                self.phases.enter(id, now);
            }
        } else if let Some(cycle) = self.cycle(Edge::new(&visit.actor, &visit.access)) {
            self.leave(id);
            let error = Error::Deadlock { cycle };
            let event = Event::new(now, &visit.access, &visit.actor, Decision::Deadlock);
            self.record(event.detail(error.to_string()));
            return Err(error);
        }
        if self.phases.get(id).is_some_and(|visit| visit.inside) {
            return Ok(Entry::Inside);
        }
        Ok(Entry::Wait {
            inside,
            epoch: self.epoch,
        })
    }

    fn leave(&mut self, id: VisitId) -> bool {
        let Some(left) = self.phases.leave(id) else {
            return false;
        };
        // If no thread is in line, and this one was not either, there is none to wake. That saves a
        // system call in every step of every runner.
        if !left.inside || self.phases.has_queue() {
            self.touch_phases();
        }
        true
    }

    /// Records that a thread left or began to wait, so that the threads in line look again.
    pub fn touch_phases(&mut self) {
        self.epoch += 1;
        self.phases_changed = self.epoch;
    }

    fn in_the_way(&self, access: Access, thread: ThreadId) -> Vec<Actor> {
        let occupants = self.phases.occupants(access, thread);
        occupants.map(|visit| visit.actor.clone()).collect()
    }

    /// Whether every conflicting visit ahead in line waits for `thread`.
    fn is_its_turn(&self, id: VisitId, thread: ThreadId) -> bool {
        self.phases
            .ahead(id)
            .all(|ahead| self.waits_through(ahead.actor.thread, thread))
    }

    /// Whether `from` waits for `to`, directly or through other threads, also behind it in line.
    fn waits_through(&self, from: ThreadId, to: ThreadId) -> bool {
        let (mut seen, mut open) = (BTreeSet::from([from]), vec![from]);
        while let Some(thread) = open.pop() {
            for next in self.waits_for(thread) {
                if next == to {
                    return true;
                }
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        false
    }

    fn waits_for(&self, thread: ThreadId) -> Vec<ThreadId> {
        let mut found = Vec::new();
        if let Some(wait) = self.wait_of(thread) {
            found.extend(self.leader_of(&wait.key));
        }
        for (id, visit) in self.phases.queued(thread) {
            let inside = self.phases.occupants(visit.access, thread);
            let ahead = self.phases.ahead(id);
            found.extend(inside.chain(ahead).map(|visit| visit.actor.thread));
        }
        found
    }

    /// The cycle that this wait would close. Visits ahead in line do not count: see `phases`.
    pub fn cycle(&self, wait: Edge) -> Option<Vec<Edge>> {
        let holders = |edge: &Edge| match &edge.subject {
            Subject::Key(key) => self.leader_of(key).into_iter().collect(),
            Subject::Phase(access) => self
                .phases
                .occupants(*access, edge.thread)
                .map(|visit| visit.actor.thread)
                .collect(),
        };
        let waits = |thread| {
            let slot = self.wait_of(thread);
            let slot = slot.map(|wait| Edge::new(&wait.actor, &wait.key));
            let phases = self.phases.queued(thread);
            let phases = phases.map(|(_, visit)| Edge::new(&visit.actor, &visit.access));
            slot.into_iter().chain(phases).collect()
        };
        find_cycle(wait, &holders, &waits)
    }

    /// What `thread` waits for, unless that slot has changed since. Then the thread is about to
    /// look again, and the answer may be other than to wait.
    fn wait_of(&self, thread: ThreadId) -> Option<&Wait> {
        let wait = self.waits.wait_of(thread)?;
        (self.slots.get(&wait.key)?.changed <= wait.epoch).then_some(wait)
    }

    fn leader_of(&self, key: &Key) -> Option<ThreadId> {
        Some(self.slot(key)?.running()?.leader.thread)
    }
}
