//! Decides what one request gets from one slot: all of single-flight, in one pure function.
//! Must never change anything.

use std::time::Duration;

use crate::actor::Actor;
use crate::error::{Error, Owner};
use crate::request::{Observed, Request};
use crate::slot::{Slot, State, Task};
use crate::spec::{diff, Spec};

#[derive(Debug, PartialEq)]
pub(crate) enum Verdict {
    Lead,
    Adopt,
    Join {
        generation: u64,
    },
    Nested,
    Wait {
        leader: Actor,
        since: Duration,
    },
    /// The caller sees no object, or another one than the ready one.
    Contradicted {
        by: Actor,
        since: Duration,
    },
    Refuse(Error),
}

pub(crate) fn judge(slot: &Slot, request: &Request, now: Duration) -> Verdict {
    match slot.state() {
        State::Idle => match request.observed {
            Observed::Present(identity) if slot.inherited() == Some(identity) => {
                Verdict::Refuse(Error::Inherited {
                    key: request.key.clone(),
                })
            }
            Observed::Present(_) => Verdict::Adopt,
            Observed::Absent | Observed::Unknown => Verdict::Lead,
        },
        State::Poisoned { reason, by, .. } => Verdict::Refuse(Error::Poisoned {
            key: request.key.clone(),
            reason: reason.clone(),
            by: by.clone(),
        }),
        State::Running(running) => {
            let own = running.leader.thread == request.actor.thread;
            let wait = Verdict::Wait {
                leader: running.leader.clone(),
                since: running.since,
            };
            match &running.task {
                Task::Build(_) | Task::Adopt(_) if own && request.policy.reentrant => {
                    Verdict::Nested
                }
                // A wait for one's own thread is a cycle of one, which the wait graph refuses.
                _ if own => wait,
                Task::Build(spec) => compare(spec, slot, request, now).unwrap_or(wait),
                // The later state is not known yet: the spec that is read, or no state.
                Task::Adopt(_) | Task::Teardown { .. } => wait,
            }
        }
        State::Ready(ready) => {
            let seen = match request.observed {
                Observed::Unknown => true,
                Observed::Absent => false,
                Observed::Present(identity) => identity == ready.identity,
            };
            if seen {
                let generation = slot.generation();
                let join = Verdict::Join { generation };
                compare(&ready.spec, slot, request, now).unwrap_or(join)
            } else {
                Verdict::Contradicted {
                    by: ready.by.clone(),
                    since: ready.since,
                }
            }
        }
    }
}

/// The leader and the holders of the state in the slot, if there is any.
pub(crate) fn owner(slot: &Slot, now: Duration) -> Option<Owner> {
    let (leader, purpose, since) = match slot.state() {
        State::Running(running) => (&running.leader, Some(running.purpose()), running.since),
        State::Ready(ready) => (&ready.by, None, ready.since),
        State::Idle | State::Poisoned { .. } => return None,
    };
    Some(Owner {
        leader: leader.clone(),
        purpose,
        age: now.saturating_sub(since),
        holders: slot.holders(),
    })
}

/// The refusal, or None if the request may share the existing state.
fn compare(existing: &Spec, slot: &Slot, request: &Request, now: Duration) -> Option<Verdict> {
    let diff = diff(existing, &request.spec);
    let key = request.key.clone();
    let owner = owner(slot, now)?;
    if !diff.is_empty() {
        Some(Verdict::Refuse(Error::SpecMismatch { key, diff, owner }))
    } else if !request.policy.reuse {
        Some(Verdict::Refuse(Error::ReuseForbidden { key, owner }))
    } else {
        None
    }
}
