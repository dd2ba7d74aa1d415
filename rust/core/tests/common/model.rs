//! A sequential model of the registry: no locks, no clock, no waiting.
//! The property test runs both side by side. Must share no logic with the crate.

use std::collections::{BTreeMap, BTreeSet};

use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::phases::{Access, VisitId};
use distguard_core::registry::Observed;
use distguard_core::slot::Origin;

/// The outcome of a call, without the parts that the model cannot predict (tickets, times, texts).
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Lead,
    Adopt,
    Join(u64),
    Nested,
    Wait(u64),
    Mismatch,
    ReuseForbidden,
    Poisoned,
    Deadlock,
    Nothing,
    TearDown(Origin),
    InUse(usize),
    Busy(u64),
    NotReady,
    Done,
    Published(u64),
    Inherited,
    /// The thread that broke the lease; None if the lease was released.
    Broken(Option<u64>),
    Inside,
    /// The threads that are inside and in the way, if any.
    InLine(Vec<u64>),
    GaveUp(Vec<u64>),
    VisitOver,
    Yes,
    No,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    pub tp: i64,
    pub identity: u64,
    pub origin: Origin,
    pub leases: BTreeSet<LeaseId>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub enum State {
    #[default]
    Idle,
    Building {
        thread: u64,
        tp: i64,
    },
    Adopting {
        thread: u64,
    },
    TearingDown {
        thread: u64,
        was: Ready,
    },
    Ready(Ready),
    Poisoned,
}

#[derive(Debug, Default)]
pub struct Slot {
    pub state: State,
    pub generation: u64,
    inherited: Option<u64>,
    /// Distinguishes a state from a later one that is equal.
    stamp: u64,
}

#[derive(Debug, Clone)]
pub struct Ask {
    pub thread: u64,
    pub key: Key,
    pub tp: i64,
    pub reuse: bool,
    pub reentrant: bool,
    pub observed: Observed,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Visit {
    pub id: VisitId,
    pub thread: u64,
    pub access: Access,
    pub inside: bool,
}

#[derive(Debug, Default)]
pub struct Model {
    pub slots: BTreeMap<Key, Slot>,
    /// By arrival.
    pub visits: Vec<Visit>,
    /// Leases that were broken with their state, and the thread that broke them.
    broken: BTreeMap<LeaseId, u64>,
    doubts: BTreeMap<u64, (Key, u64)>,
    stamps: u64,
    floor: u64,
}

impl Model {
    fn set(&mut self, key: &Key, state: State) {
        self.stamps += 1;
        let (stamp, floor) = (self.stamps, self.floor);
        let slot = self.slots.entry(key.clone()).or_insert_with(|| Slot {
            generation: floor,
            ..Slot::default()
        });
        slot.state = state;
        slot.stamp = stamp;
    }

    /// The state is going away while leases on it are held.
    fn break_leases(&mut self, key: &Key, by: u64) {
        if let State::Ready(ready) | State::TearingDown { was: ready, .. } = self.state(key) {
            let broken = ready.leases.into_iter().map(|id| (id, by));
            self.broken.extend(broken);
        }
    }

    fn leader(&self, key: &Key) -> u64 {
        match self.state(key) {
            State::Building { thread, .. }
            | State::Adopting { thread }
            | State::TearingDown { thread, .. } => thread,
            other => panic!("no thread leads in {other:?}"),
        }
    }

    fn state(&self, key: &Key) -> State {
        let slot = self.slots.get(key);
        slot.map_or(State::Idle, |slot| slot.state.clone())
    }

    pub fn generation(&self, key: &Key) -> u64 {
        self.slots.get(key).map_or(0, |slot| slot.generation)
    }

    pub fn acquire(&mut self, ask: &Ask) -> Outcome {
        let doubted = self.doubts.remove(&ask.thread);
        if let State::Ready(ready) = self.state(&ask.key) {
            let contradicted = match ask.observed {
                Observed::Unknown => false,
                Observed::Absent => true,
                Observed::Present(identity) => identity != ready.identity,
            };
            if contradicted {
                let doubt = (ask.key.clone(), self.slots[&ask.key].stamp);
                if doubted != Some(doubt.clone()) {
                    self.doubts.insert(ask.thread, doubt);
                    return Outcome::Wait(u64::MAX);
                }
                self.break_leases(&ask.key, ask.thread);
                self.set(&ask.key, State::Idle);
            }
        }
        // A wait that would lead back to the asking thread is refused.
        let wait = |leader| {
            if self.is_stuck_behind(leader, ask.thread) {
                Outcome::Deadlock
            } else {
                Outcome::Wait(leader)
            }
        };
        let generation = self.generation(&ask.key);
        let equal = |tp, otherwise| match (tp == ask.tp, ask.reuse) {
            (false, _) => Outcome::Mismatch,
            (true, false) => Outcome::ReuseForbidden,
            (true, true) => otherwise,
        };
        match self.state(&ask.key) {
            State::Idle if self.is_inherited(&ask.key, ask.observed) => Outcome::Inherited,
            State::Idle if matches!(ask.observed, Observed::Present(_)) => {
                let thread = ask.thread;
                self.set(&ask.key, State::Adopting { thread });
                Outcome::Adopt
            }
            State::Idle => {
                let (thread, tp) = (ask.thread, ask.tp);
                self.set(&ask.key, State::Building { thread, tp });
                Outcome::Lead
            }
            State::Building { thread, .. } | State::Adopting { thread } if thread == ask.thread => {
                if ask.reentrant {
                    Outcome::Nested
                } else {
                    Outcome::Deadlock
                }
            }
            State::Building { thread, tp } => equal(tp, wait(thread)),
            State::TearingDown { thread, .. } if thread == ask.thread => Outcome::Deadlock,
            State::Adopting { thread } | State::TearingDown { thread, .. } => wait(thread),
            State::Ready(ready) => equal(ready.tp, Outcome::Join(generation)),
            State::Poisoned => Outcome::Poisoned,
        }
    }

    fn is_inherited(&self, key: &Key, observed: Observed) -> bool {
        let inherited = self.slots.get(key).and_then(|slot| slot.inherited);
        inherited.is_some_and(|identity| observed == Observed::Present(identity))
    }

    pub fn inherit(&mut self, key: &Key, identity: u64) {
        let floor = self.floor;
        let slot = self.slots.entry(key.clone()).or_insert_with(|| Slot {
            generation: floor,
            ..Slot::default()
        });
        slot.inherited = Some(identity);
    }

    pub fn publish(&mut self, key: &Key, tp: i64, origin: Origin, identity: u64) -> Outcome {
        let leases = BTreeSet::new();
        let ready = Ready {
            tp,
            identity,
            origin,
            leases,
        };
        self.set(key, State::Ready(ready));
        let slot = self.slots.get_mut(key).unwrap();
        slot.generation += 1;
        Outcome::Published(slot.generation)
    }

    pub fn fail(&mut self, key: &Key) {
        let before = match self.state(key) {
            State::TearingDown { was, .. } => State::Ready(was),
            _ => State::Idle,
        };
        self.set(key, before);
    }

    pub fn poison(&mut self, key: &Key) {
        self.break_leases(key, self.leader(key));
        self.set(key, State::Poisoned);
    }

    pub fn end(&mut self, key: &Key) {
        self.break_leases(key, self.leader(key));
        self.set(key, State::Idle);
    }

    /// Whether the lease may be taken; `leased` says under which number it was.
    pub fn may_lease(&self, key: &Key, at: Option<u64>) -> Outcome {
        let current = at.is_none_or(|at| at == self.generation(key));
        match self.state(key) {
            State::Ready(_) if current => Outcome::Yes,
            _ => Outcome::NotReady,
        }
    }

    pub fn leased(&mut self, key: &Key, id: LeaseId) {
        if let State::Ready(ready) = &mut self.slots.get_mut(key).unwrap().state {
            assert!(ready.leases.insert(id), "{id:?} was given out twice");
        }
    }

    pub fn release(&mut self, id: LeaseId) -> Outcome {
        let held = self.slots.values_mut().any(|slot| match &mut slot.state {
            State::Ready(ready) | State::TearingDown { was: ready, .. } => ready.leases.remove(&id),
            _ => false,
        });
        if held {
            Outcome::Yes
        } else {
            self.broken.remove(&id);
            Outcome::No
        }
    }

    /// Yes, or the fate of the first lease that is not good.
    pub fn check(&self, leases: &[(Key, LeaseId)]) -> Outcome {
        for (key, id) in leases {
            let by = match self.state(key) {
                State::Ready(ready) if ready.leases.contains(id) => continue,
                State::TearingDown { thread, was } if was.leases.contains(id) => Some(thread),
                _ => self.broken.get(id).copied(),
            };
            return Outcome::Broken(by);
        }
        Outcome::Yes
    }

    pub fn begin_teardown(&mut self, key: &Key, thread: u64, force: bool) -> Outcome {
        match self.state(key) {
            State::Idle | State::Poisoned => Outcome::Nothing,
            State::Building { thread: by, .. }
            | State::Adopting { thread: by }
            | State::TearingDown { thread: by, .. } => {
                if by == thread {
                    Outcome::Nothing
                } else {
                    Outcome::Busy(by)
                }
            }
            State::Ready(was) if !was.leases.is_empty() && !force => {
                Outcome::InUse(was.leases.len())
            }
            State::Ready(was) => {
                let origin = was.origin;
                self.set(key, State::TearingDown { thread, was });
                Outcome::TearDown(origin)
            }
        }
    }

    pub fn forget(&mut self, key: &Key) -> Outcome {
        match self.state(key) {
            State::Ready(ready) if ready.leases.is_empty() => {
                self.set(key, State::Idle);
                Outcome::Yes
            }
            _ => Outcome::No,
        }
    }

    pub fn remove(&mut self, key: &Key) -> Outcome {
        let free = match self.state(key) {
            State::Ready(ready) => ready.leases.is_empty(),
            State::Idle | State::Poisoned => self.slots.contains_key(key),
            _ => false,
        };
        if !free {
            return Outcome::No;
        }
        let removed = self.slots.remove(key).unwrap();
        self.floor = self.floor.max(removed.generation);
        Outcome::Yes
    }

    pub fn reset(&mut self, thread: u64, force: bool) -> Outcome {
        for slot in self.slots.values() {
            match &slot.state {
                State::Building { thread, .. }
                | State::Adopting { thread }
                | State::TearingDown { thread, .. } => return Outcome::Busy(*thread),
                State::Ready(ready) if !ready.leases.is_empty() && !force => {
                    return Outcome::InUse(ready.leases.len())
                }
                _ => {}
            }
        }
        let keys: Vec<Key> = self.slots.keys().cloned().collect();
        for key in keys {
            if self.state(&key) != State::Idle {
                self.break_leases(&key, thread);
                self.set(&key, State::Idle);
            }
        }
        Outcome::Done
    }
}
