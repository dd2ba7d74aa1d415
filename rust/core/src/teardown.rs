//! Taking shared state down: refused while it is held, exclusive while it runs.

use crate::actor::Actor;
use crate::error::Error;
use crate::key::Key;
use crate::lease::Holder;
use crate::policy::Decision;
use crate::registry::Registry;
use crate::slot::{Origin, Phase, Slot, Ticket, Work};
use crate::spec::Spec;

/// What is to be torn down.
#[derive(Debug, PartialEq)]
pub enum Teardown {
    /// The registry knows of nothing.
    Nothing,
    /// State, now closed to everybody else until the ticket is given back.
    Begun {
        /// Ends it: `end_teardown`, or `fail` and `poison` as for an initialisation.
        ticket: Ticket,
        /// Whether the registry made it; what was adopted is not destroyed.
        origin: Origin,
        /// Whose leases were broken (only when forced).
        broken: Vec<Holder>,
    },
}

impl Registry {
    /// Closes the state of `key` for teardown.
    ///
    /// Refused while it is leased, unless `force`, and while a thread initialises it or tears it
    /// down. Poisoned state counts as nothing to tear down: only `reset` leaves it.
    pub fn begin_teardown(&self, key: &Key, actor: &Actor, force: bool) -> Result<Teardown, Error> {
        self.update(|state, now| {
            let (origin, broken) = match state.slots.get(key).map(|slot| &slot.phase) {
                None | Some(Phase::Idle | Phase::Poisoned { .. }) => return Ok(Teardown::Nothing),
                Some(Phase::Running(running)) => {
                    return Err(Error::Busy {
                        key: key.clone(),
                        leader: running.leader.clone(),
                    })
                }
                Some(Phase::Ready(ready)) => {
                    let holders: Vec<Holder> = ready.leases.values().cloned().collect();
                    if !holders.is_empty() && !force {
                        return Err(Error::InUse {
                            key: key.clone(),
                            holders,
                        });
                    }
                    (ready.origin, holders)
                }
            };
            let ticket = state.claim(key, actor, Spec::default(), Work::Teardown, now);
            let detail = match broken.as_slice() {
                [] => String::new(),
                held => format!(
                    "forced, breaking the leases of {}",
                    crate::error::list(held)
                ),
            };
            state.note(key, actor.clone(), Decision::Teardown, now, detail);
            Ok(Teardown::Begun {
                ticket,
                origin,
                broken,
            })
        })
    }

    /// The state is gone.
    pub fn end_teardown(&self, ticket: Ticket) {
        self.update(|state, _now| {
            if state
                .slots
                .get(&ticket.key)
                .is_some_and(|slot| slot.is_led_by(&ticket))
            {
                state.slot(&ticket.key).clear();
            }
        });
    }

    /// Forgets all state, also poisoned. Generations go on counting.
    ///
    /// Refused while anything is leased, unless `force`, and while a thread initialises or tears
    /// down; then nothing is changed.
    pub fn reset(&self, actor: &Actor, force: bool) -> Result<(), Error> {
        self.update(|state, now| {
            for (key, slot) in &state.slots {
                if let Some(running) = slot.running() {
                    return Err(Error::Busy {
                        key: key.clone(),
                        leader: running.leader.clone(),
                    });
                }
                let leases = slot.ready().map(|ready| &ready.leases);
                if let Some(leases) = leases.filter(|leases| !leases.is_empty() && !force) {
                    return Err(Error::InUse {
                        key: key.clone(),
                        holders: leases.values().cloned().collect(),
                    });
                }
            }
            let keys: Vec<Key> = state.slots.keys().cloned().collect();
            for key in keys {
                state.slots.entry(key.clone()).and_modify(Slot::clear);
                state.note(&key, actor.clone(), Decision::Reset, now, String::new());
            }
            state.leases.clear();
            Ok(())
        })
    }
}
