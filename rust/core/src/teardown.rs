//! Taking shared state down: refused while it is held, exclusive while it runs.
//! Must never forget state that a thread is making or tearing down.

use crate::actor::Actor;
use crate::error::{join, Error};
use crate::events::Event;
use crate::key::Key;
use crate::lease::Holder;
use crate::policy::Decision;
use crate::registry::Registry;
use crate::slot::{Origin, Slot, State, Ticket};

/// The result of beginning a teardown.
#[derive(Debug, PartialEq)]
#[must_use]
pub enum Teardown {
    /// Nothing that the registry protects: there is no state, or it is poisoned, or the caller's
    /// own thread leads the key and tears down what it was making.
    Nothing,
    /// State that is now closed to all other callers until the ticket is resolved.
    Begun {
        /// Ends it: by `end_teardown`, by `fail` if the state is as it was, or by `poison` if not.
        ticket: Ticket,
        /// Whether the registry made the state; adopted state is not destroyed.
        origin: Origin,
        /// The holders whose leases break when it ends (only when forced).
        broken: Vec<Holder>,
    },
}

impl Registry {
    /// Closes the state of `key` for teardown; requests for it wait meanwhile.
    ///
    /// Refused while it is leased, unless `force`, and while another thread initialises it or
    /// tears it down.
    pub fn begin_teardown(&self, key: &Key, actor: &Actor, force: bool) -> Result<Teardown, Error> {
        self.begin_teardown_because(key, actor, force, "")
    }

    /// `begin_teardown`; holders whose leases break are told `why`, unless it is empty.
    pub fn begin_teardown_because(
        &self,
        key: &Key,
        actor: &Actor,
        force: bool,
        why: &str,
    ) -> Result<Teardown, Error> {
        self.update(|inner, now| {
            let origin = match inner.slot(key).map(Slot::state) {
                None | Some(State::Idle | State::Poisoned { .. }) => return Ok(Teardown::Nothing),
                Some(State::Running(running)) if running.leader.thread == actor.thread => {
                    return Ok(Teardown::Nothing)
                }
                Some(State::Running(running)) => {
                    let error = Error::Busy {
                        key: key.clone(),
                        leader: running.leader.clone(),
                    };
                    return Err(inner.refuse(key, actor, error, now));
                }
                Some(State::Ready(ready)) => ready.origin,
            };
            let broken = inner.slot_mut(key).holders();
            if !broken.is_empty() && !force {
                let error = Error::InUse {
                    key: key.clone(),
                    holders: broken,
                };
                return Err(inner.refuse(key, actor, error, now));
            }
            let id = inner.fresh_id();
            inner.slot_mut(key).tear_down(id, actor.clone(), why, now);
            inner.touch(key);
            let detail = if broken.is_empty() {
                String::new()
            } else {
                format!("forced, breaking the leases of {}", join(&broken, ", "))
            };
            inner.record(Event::new(now, key, actor, Decision::Teardown).detail(detail));
            let key = key.clone();
            Ok(Teardown::Begun {
                ticket: Ticket { key, id },
                origin,
                broken,
            })
        })
    }

    /// Forgets state that has no holders, so that it can be made anew. False when it is held,
    /// changing or absent.
    pub fn forget(&self, key: &Key) -> bool {
        self.update(|inner, now| {
            let ready = inner.slot(key).and_then(Slot::ready);
            let Some(ready) = ready.filter(|ready| ready.leases.is_empty()) else {
                return false;
            };
            let by = ready.by.clone();
            inner.slot_mut(key).forget();
            inner.touch(key);
            let event = Event::new(now, key, &by, Decision::Forget);
            inner.record(event.detail("the state that it had made had no holders"));
            true
        })
    }

    /// Removes all records of a key that is not requested again, because its scope is gone. False
    /// when it is held or changing; then it stays. If it is requested again, generations continue.
    pub fn remove(&self, key: &Key) -> bool {
        self.update(|inner, _| {
            let free = inner
                .slot(key)
                .is_some_and(|slot| slot.running().is_none() && slot.holders().is_empty());
            if free {
                inner.remove(key);
            }
            free
        })
    }

    /// Forgets all state, also poisoned state. Generations continue.
    ///
    /// Refused while anything is leased, unless `force`, and while a thread initialises or tears
    /// down; then nothing changes.
    pub fn reset(&self, actor: &Actor, force: bool) -> Result<(), Error> {
        self.update(|inner, now| {
            let keys: Vec<Key> = inner.slots.keys().cloned().collect();
            for key in &keys {
                let slot = inner.slot_mut(key);
                let holders = slot.holders();
                let error = match slot.running() {
                    Some(running) => Error::Busy {
                        key: key.clone(),
                        leader: running.leader.clone(),
                    },
                    None if !holders.is_empty() && !force => Error::InUse {
                        key: key.clone(),
                        holders,
                    },
                    None => continue,
                };
                return Err(inner.refuse(key, actor, error, now));
            }
            for key in keys {
                if inner.slot_mut(&key).forget() {
                    inner.touch(&key);
                    inner.break_leases(&key, actor, "reset the registry by force");
                    inner.record(Event::new(now, &key, actor, Decision::Reset));
                }
            }
            Ok(())
        })
    }
}
