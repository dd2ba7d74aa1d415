//! Acquiring a key: applies the verdict of `rules`, waits in slices, refuses endless waits.
//! The caller blocks and looks at the real process; none of its code runs under the lock.

use std::time::Duration;

use crate::error::Error;
use crate::events::Event;
use crate::policy::Decision;
use crate::registry::{Inner, Registry};
use crate::request::{Request, Step};
use crate::rules::{judge, owner, Verdict};
use crate::slot::{Task, Ticket};
use crate::sync;
use crate::waitgraph::Edge;

impl Registry {
    /// Decides about `request` without waiting.
    ///
    /// - No state: `Lead`, or `Adopt` when the caller sees a live object.
    /// - A leader is working: `Wait`. While it initialises, unequal requests and those that may not
    ///   reuse are refused at once. The leader's own thread gets `Nested` if its policy is
    ///   reentrant, and is refused as a deadlock if not.
    /// - Ready: `Join`, or refused with the fields that differ.
    /// - Ready, but the caller sees another object or none: the state may have been changed outside
    ///   the registry, or it was published after the caller looked. So the first answer is a `Wait`
    ///   that ends at once. If the same thread looks again and still contradicts the same state,
    ///   the state and its leases are forgotten, and the key is acquired as if it had no state.
    /// - Poisoned, or a wait that would close a cycle: refused.
    pub fn try_acquire(&self, request: &Request) -> Result<Step, Error> {
        self.update(|inner, now| inner.acquire(request, now))
    }

    /// Waits until the key changes after `epoch`, which came with `Step::Wait`; at most `slice`.
    ///
    /// May return early; the caller looks and asks again in any case. No wake-up is lost: `epoch`
    /// is compared under the lock that every change takes. The waiting thread is in the wait-for
    /// graph. If it would close a cycle there, it does not sleep, and its next request is refused.
    pub fn wait(&self, request: &Request, epoch: u64, slice: Duration) {
        let mut inner = self.lock();
        let unchanged = inner
            .slots
            .get(&request.key)
            .is_some_and(|it| it.changed <= epoch && it.slot.running().is_some());
        // Two threads that were both told to wait may close a cycle only here.
        let edge = Edge::new(&request.actor, &request.key);
        if !unchanged || inner.cycle(edge).is_some() {
            return;
        }
        let (actor, key, now) = (request.actor.clone(), request.key.clone(), inner.epoch);
        inner.waits.begin(actor, key, now);
        if inner.phases.has_queue() {
            // A thread that waits for this one may now overtake those that this one waits for.
            inner.touch_phases();
            self.moved.notify_all();
        }
        inner = sync::wait_timeout(&self.changed, inner, slice);
        inner.waits.end(request.actor.thread);
    }

    /// The error of a caller whose deadline has passed; records it.
    pub fn timed_out(&self, request: &Request) -> Error {
        self.update(|inner, now| {
            let error = Error::Timeout {
                key: request.key.clone(),
                owner: inner.slot(&request.key).and_then(|slot| owner(slot, now)),
                waited: request.waited,
            };
            inner.note(request, Decision::Timeout, error.to_string(), now);
            error
        })
    }
}

impl Inner {
    fn acquire(&mut self, request: &Request, now: Duration) -> Result<Step, Error> {
        let doubted = self.doubts.remove(&request.actor.thread);
        let mut verdict = judge(self.slot_mut(&request.key), request, now);
        if let Verdict::Contradicted { by, since } = verdict {
            let doubt = (request.key.clone(), self.tracked(&request.key).changed);
            if doubted.as_ref() != Some(&doubt) {
                self.doubts.insert(request.actor.thread, doubt);
                return Ok(Step::Wait {
                    leader: by,
                    since,
                    epoch: self.epoch,
                });
            }
            self.forget_changed(request, now);
            verdict = judge(self.slot_mut(&request.key), request, now);
        }
        match verdict {
            Verdict::Lead => {
                let ticket = self.claim(request, Task::Build(request.spec.clone()), now);
                self.note(request, Decision::Lead, request.spec.to_string(), now);
                Ok(Step::Lead(ticket))
            }
            Verdict::Adopt => {
                let ticket = self.claim(request, Task::Adopt(request.spec.clone()), now);
                self.note(request, Decision::Adopt, request.spec.to_string(), now);
                Ok(Step::Adopt(ticket))
            }
            Verdict::Join { generation } => {
                self.note(request, Decision::Join, String::new(), now);
                Ok(Step::Join { generation })
            }
            Verdict::Nested => {
                self.note(request, Decision::Nested, String::new(), now);
                Ok(Step::Nested)
            }
            Verdict::Wait { leader, since } => {
                if let Some(cycle) = self.cycle(Edge::new(&request.actor, &request.key)) {
                    let error = Error::Deadlock { cycle };
                    self.note(request, Decision::Deadlock, error.to_string(), now);
                    return Err(error);
                }
                // Waiters ask again and again; only the first time is recorded.
                if request.waited.is_zero() {
                    self.note(request, Decision::Wait, format!("for {leader}"), now);
                }
                let took = now.saturating_sub(since);
                if took >= request.slow_after && self.slot_mut(&request.key).call_slow() {
                    let waiter = &request.actor;
                    let detail = format!("for {:.1} s, {waiter} waits", took.as_secs_f64());
                    let event = Event::new(now, &request.key, &leader, Decision::Slow);
                    self.record(event.waited(request.waited).detail(detail));
                }
                Ok(Step::Wait {
                    leader,
                    since,
                    epoch: self.epoch,
                })
            }
            Verdict::Refuse(error) => {
                self.note(request, Decision::Refuse, error.to_string(), now);
                Err(error)
            }
            Verdict::Contradicted { .. } => unreachable!("an idle slot contradicts no request"),
        }
    }

    fn claim(&mut self, request: &Request, task: Task, now: Duration) -> Ticket {
        let (key, id) = (request.key.clone(), self.fresh_id());
        let led = self
            .slot_mut(&key)
            .lead(id, request.actor.clone(), task, now);
        debug_assert!(led, "only an idle slot is claimed");
        self.touch(&key);
        Ticket { key, id }
    }

    /// Forgets state whose real object was destroyed or replaced outside the registry.
    fn forget_changed(&mut self, request: &Request, now: Duration) {
        let slot = self.slot_mut(&request.key);
        let holders = slot.holders();
        slot.forget();
        self.touch(&request.key);
        let how = "found it destroyed or replaced outside of sglang_distguard";
        self.break_leases(&request.key, &request.actor, how);
        let mut detail = "changed outside the registry".to_owned();
        if !holders.is_empty() {
            detail += " while held by ";
            detail += &crate::error::join(&holders, ", ");
        }
        self.note(request, Decision::OutOfBand, detail, now);
    }

    fn note(&mut self, request: &Request, decision: Decision, detail: String, now: Duration) {
        let event = Event::new(now, &request.key, &request.actor, decision);
        self.record(event.waited(request.waited).detail(detail));
    }
}
