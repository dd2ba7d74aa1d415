//! Any sequence of calls has the outcomes of the sequential model, and leaves the same state.

mod common;
#[path = "common/model.rs"]
mod model;
#[path = "common/model_phases.rs"]
mod model_phases;

use std::time::Duration;

use common::{actor, groups, registry, spec};
use distguard_core::actor::Actor;
use distguard_core::enter::Entry;
use distguard_core::error::Error;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::phases::{Access, Phase, RunnerId, VisitId};
use distguard_core::policy::Policy;
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Ticket};
use distguard_core::snapshot::SlotState;
use distguard_core::teardown::Teardown;
use model::{Ask, Model, Outcome, State};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Resolve {
    Publish {
        tp: i64,
        adopted: bool,
        identity: u64,
    },
    Fail,
    Poison,
    End,
}

/// `pick` chooses among the objects that exist when the call is made.
#[derive(Debug, Clone)]
enum Call {
    Acquire(Ask),
    Resolve { pick: usize, how: Resolve },
    Lease { keys: Vec<Key>, insist: Option<u64> },
    Release { pick: usize },
    BeginTeardown { key: Key, thread: u64, force: bool },
    Forget { key: Key },
    Remove { key: Key },
    Reset { thread: u64, force: bool },
    CheckLeases { picks: Vec<usize> },
    Inherit { key: Key, identity: u64 },
    Arrive { access: Access, thread: u64 },
    TryEnter { pick: usize },
    Leave { pick: usize },
    GiveUp { pick: usize },
}

/// Few runners, so that they meet; a draft of runner 0 among them.
fn access() -> impl Strategy<Value = Access> {
    let phase = prop::sample::select(&Phase::ALL[..]);
    let runner = prop::option::weighted(0.8, 0..3u64);
    (phase, runner).prop_map(|(phase, runner)| Access {
        phase,
        runner: runner.map(RunnerId),
        target: (runner == Some(2)).then_some(RunnerId(0)),
    })
}

fn key() -> impl Strategy<Value = Key> {
    prop_oneof![
        Just(Key::World),
        Just(groups("")),
        Just(Key::Experts("a".into()))
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    let observed = prop_oneof![
        4 => Just(Observed::Unknown),
        2 => Just(Observed::Absent),
        4 => (1..3u64).prop_map(Observed::Present),
    ];
    let policy = (prop::bool::weighted(0.8), any::<bool>());
    (0..3u64, key(), 1..3i64, policy, observed).prop_map(
        |(thread, key, tp, (reuse, reentrant), observed)| Ask {
            thread,
            key,
            tp,
            reuse,
            reentrant,
            observed,
        },
    )
}

fn call() -> impl Strategy<Value = Call> {
    let publish =
        (1..3i64, any::<bool>(), 1..3u64).prop_map(|(tp, adopted, identity)| Resolve::Publish {
            tp,
            adopted,
            identity,
        });
    let how = prop_oneof![
        6 => publish,
        2 => Just(Resolve::Fail),
        1 => Just(Resolve::Poison),
        2 => Just(Resolve::End),
    ];
    let leased = prop::collection::vec(key(), 1..3);
    let picks = prop::collection::vec(any::<usize>(), 1..4);
    prop_oneof![
        8 => ask().prop_map(Call::Acquire),
        6 => (any::<usize>(), how).prop_map(|(pick, how)| Call::Resolve { pick, how }),
        3 => (leased, prop::option::of(0..4u64))
            .prop_map(|(keys, insist)| Call::Lease { keys, insist }),
        3 => any::<usize>().prop_map(|pick| Call::Release { pick }),
        3 => (key(), 0..3u64, any::<bool>())
            .prop_map(|(key, thread, force)| Call::BeginTeardown { key, thread, force }),
        1 => key().prop_map(|key| Call::Forget { key }),
        1 => key().prop_map(|key| Call::Remove { key }),
        1 => (0..3u64, any::<bool>()).prop_map(|(thread, force)| Call::Reset { thread, force }),
        2 => picks.prop_map(|picks| Call::CheckLeases { picks }),
        1 => (key(), 1..3u64).prop_map(|(key, identity)| Call::Inherit { key, identity }),
        8 => (access(), 0..4u64).prop_map(|(access, thread)| Call::Arrive { access, thread }),
        4 => any::<usize>().prop_map(|pick| Call::TryEnter { pick }),
        6 => any::<usize>().prop_map(|pick| Call::Leave { pick }),
        1 => any::<usize>().prop_map(|pick| Call::GiveUp { pick }),
    ]
}

/// The registry, the model, and the objects that callers would hold.
struct Both {
    real: Registry,
    model: Model,
    tickets: Vec<Ticket>,
    leases: Vec<(Key, LeaseId)>,
    visits: Vec<VisitId>,
}

fn refused(error: &Error) -> Outcome {
    match error {
        Error::SpecMismatch { .. } => Outcome::Mismatch,
        Error::ReuseForbidden { .. } => Outcome::ReuseForbidden,
        Error::Poisoned { .. } => Outcome::Poisoned,
        Error::Deadlock { .. } => Outcome::Deadlock,
        Error::InUse { holders, .. } => Outcome::InUse(holders.len()),
        Error::Busy { leader, .. } => Outcome::Busy(leader.thread.0),
        Error::NotReady { .. } => Outcome::NotReady,
        Error::Inherited { .. } => Outcome::Inherited,
        Error::LeaseBroken { by, .. } => Outcome::Broken(by.as_ref().map(|by| by.thread.0)),
        Error::PhaseTimeout { inside, .. } => Outcome::GaveUp(threads(inside)),
        Error::VisitOver => Outcome::VisitOver,
        _ => panic!("{error}"),
    }
}

fn threads(actors: &[Actor]) -> Vec<u64> {
    actors.iter().map(|it| it.thread.0).collect()
}

fn entered(entry: Result<Entry, Error>) -> Outcome {
    match entry {
        Ok(Entry::Inside) => Outcome::Inside,
        Ok(Entry::Wait { inside, .. }) => Outcome::InLine(threads(&inside)),
        Err(error) => refused(&error),
    }
}

fn said(yes: bool) -> Outcome {
    if yes {
        Outcome::Yes
    } else {
        Outcome::No
    }
}

impl Both {
    /// Makes the call on both sides; returns the registry's and the model's outcome.
    fn call(&mut self, call: &Call) -> (Outcome, Outcome) {
        match call {
            Call::Acquire(ask) => self.acquire(ask),
            Call::Resolve { pick, how } => self.resolve(*pick, how),
            Call::Lease { keys, insist } => self.lease(keys, *insist),
            Call::Release { pick } => {
                if self.leases.is_empty() {
                    return (Outcome::Done, Outcome::Done);
                }
                // Released leases stay in the list, so that they are released again.
                let id = self.leases[pick % self.leases.len()].1;
                (said(self.real.release(id)), self.model.release(id))
            }
            Call::BeginTeardown { key, thread, force } => {
                let real = match self.real.begin_teardown(key, &actor(*thread), *force) {
                    Ok(Teardown::Nothing) => Outcome::Nothing,
                    Ok(Teardown::Begun { ticket, origin, .. }) => {
                        self.tickets.push(ticket);
                        Outcome::TearDown(origin)
                    }
                    Err(error) => refused(&error),
                };
                (real, self.model.begin_teardown(key, *thread, *force))
            }
            Call::Forget { key } => (said(self.real.forget(key)), self.model.forget(key)),
            Call::Remove { key } => (said(self.real.remove(key)), self.model.remove(key)),
            Call::Reset { thread, force } => {
                let real = match self.real.reset(&actor(*thread), *force) {
                    Ok(()) => Outcome::Done,
                    Err(error) => refused(&error),
                };
                (real, self.model.reset(*thread, *force))
            }
            Call::CheckLeases { picks } if !self.leases.is_empty() => {
                let leases = picks.iter().map(|it| &self.leases[it % self.leases.len()]);
                self.check(&leases.cloned().collect::<Vec<_>>())
            }
            Call::Inherit { key, identity } => {
                self.real.inherit(key, *identity);
                self.model.inherit(key, *identity);
                (Outcome::Done, Outcome::Done)
            }
            Call::Arrive { access, thread } => self.arrive(*access, *thread),
            Call::TryEnter { pick } if !self.visits.is_empty() => {
                let id = self.visits[pick % self.visits.len()];
                (entered(self.real.try_enter(id)), self.model.try_enter(id))
            }
            Call::Leave { pick } if !self.visits.is_empty() => {
                let id = self.visits[pick % self.visits.len()];
                (said(self.real.leave(id)), self.model.leave(id))
            }
            Call::GiveUp { pick } if !self.visits.is_empty() => {
                let id = self.visits[pick % self.visits.len()];
                let real = self.real.phase_timed_out(id, Duration::ZERO);
                (refused(&real), self.model.time_out(id))
            }
            _ => (Outcome::Done, Outcome::Done),
        }
    }

    fn check(&self, leases: &[(Key, LeaseId)]) -> (Outcome, Outcome) {
        let real = match self.real.check_leases(leases) {
            Ok(()) => Outcome::Yes,
            Err(error) => refused(&error),
        };
        (real, self.model.check(leases))
    }

    /// The indices of the leases that are good now.
    fn good_leases(&self) -> Vec<usize> {
        let good = |lease: &(Key, LeaseId)| self.real.check_leases(std::slice::from_ref(lease));
        let places = self.leases.iter().enumerate();
        places
            .filter(|(_, lease)| good(lease).is_ok())
            .map(|(place, _)| place)
            .collect()
    }

    fn arrive(&mut self, access: Access, thread: u64) -> (Outcome, Outcome) {
        let (id, real) = match self.real.arrive(access, &actor(thread)) {
            Ok((id, entry)) => (id, entered(Ok(entry))),
            // The refused visit has ended, under a number that the caller was not told.
            Err(error) => (VisitId(0), refused(&error)),
        };
        self.visits.push(id);
        (real, self.model.arrive(id, access, thread))
    }

    fn acquire(&mut self, ask: &Ask) -> (Outcome, Outcome) {
        let request = Request {
            key: ask.key.clone(),
            spec: spec(ask.tp),
            policy: Policy {
                reuse: ask.reuse,
                reentrant: ask.reentrant,
            },
            actor: actor(ask.thread),
            observed: ask.observed,
            waited: Duration::ZERO,
            slow_after: common::FOREVER,
        };
        let expected = self.model.acquire(ask);
        let real = match self.real.try_acquire(&request) {
            Ok(Step::Lead(ticket)) => {
                self.tickets.push(ticket);
                Outcome::Lead
            }
            Ok(Step::Adopt(ticket)) => {
                self.tickets.push(ticket);
                Outcome::Adopt
            }
            Ok(Step::Join { generation }) => Outcome::Join(generation),
            Ok(Step::Nested) => Outcome::Nested,
            // "Look again" names the publishing thread, which the model does not record.
            Ok(Step::Wait { .. }) if expected == Outcome::Wait(u64::MAX) => expected.clone(),
            Ok(Step::Wait { leader, .. }) => Outcome::Wait(leader.thread.0),
            Err(error) => refused(&error),
        };
        (real, expected)
    }

    fn resolve(&mut self, pick: usize, how: &Resolve) -> (Outcome, Outcome) {
        if self.tickets.is_empty() {
            return (Outcome::Done, Outcome::Done);
        }
        let ticket = self.tickets.swap_remove(pick % self.tickets.len());
        let key = ticket.key().clone();
        match *how {
            Resolve::Publish {
                tp,
                adopted,
                identity,
            } => {
                let origin = if adopted {
                    Origin::Adopted
                } else {
                    Origin::Created
                };
                let real = self.real.publish(ticket, spec(tp), origin, identity);
                let real = Outcome::Published(real.expect("it leads"));
                (real, self.model.publish(&key, tp, origin, identity))
            }
            Resolve::Fail => {
                self.model.fail(&key);
                (said(self.real.fail(ticket, "boom")), Outcome::Yes)
            }
            Resolve::Poison => {
                self.model.poison(&key);
                (said(self.real.poison(ticket, "half")), Outcome::Yes)
            }
            Resolve::End => {
                self.model.end(&key);
                (said(self.real.end_teardown(ticket)), Outcome::Yes)
            }
        }
    }

    fn lease(&mut self, keys: &[Key], insist: Option<u64>) -> (Outcome, Outcome) {
        let may = |key| self.model.may_lease(key, insist) == Outcome::Yes;
        let expected = if keys.iter().all(may) {
            Outcome::Yes
        } else {
            Outcome::NotReady
        };
        let taken = match insist {
            None => self.real.lease(keys, "a", &actor(0)),
            Some(at) => {
                let keys: Vec<_> = keys.iter().map(|key| (key.clone(), at)).collect();
                self.real.lease_at(&keys, "a", &actor(0))
            }
        };
        let real = match taken {
            Ok(ids) => {
                for (key, id) in keys.iter().zip(&ids) {
                    self.model.leased(key, *id);
                }
                self.leases.extend(keys.iter().cloned().zip(ids));
                Outcome::Yes
            }
            Err(error) => refused(&error),
        };
        (real, expected)
    }

    fn assert_same_state(&self) {
        let snapshot = self.real.snapshot();
        for slot in &snapshot.slots {
            let expected = self.model.slots.get(&slot.key);
            let expected_state = expected.map_or(&State::Idle, |it| &it.state);
            match (&slot.state, expected_state) {
                (SlotState::Idle, State::Idle) | (SlotState::Poisoned { .. }, State::Poisoned) => {}
                (
                    SlotState::Ready {
                        spec: it,
                        origin,
                        holders,
                        ..
                    },
                    State::Ready(ready),
                ) => {
                    assert_eq!(*it, spec(ready.tp));
                    assert_eq!(*origin, ready.origin);
                    assert_eq!(holders.len(), ready.leases.len());
                    assert_eq!(slot.identity, Some(ready.identity));
                }
                (
                    SlotState::Running {
                        leader, teardown, ..
                    },
                    State::Building { thread, .. }
                    | State::Adopting { thread }
                    | State::TearingDown { thread, .. },
                ) => {
                    assert_eq!(leader.thread.0, *thread);
                    let down = matches!(expected_state, State::TearingDown { .. });
                    assert_eq!(*teardown, down);
                }
                (real, expected) => panic!("{}: {real:?}, not {expected:?}", slot.key),
            }
            assert_eq!(slot.generation, self.model.generation(&slot.key));
            let led = self.tickets.iter().filter(|it| *it.key() == slot.key);
            let running = matches!(slot.state, SlotState::Running { .. });
            assert_eq!(led.count(), usize::from(running));
        }
        for lease in &self.leases {
            let (real, model) = self.check(std::slice::from_ref(lease));
            assert_eq!(real, model, "{lease:?}");
        }
        let visits = snapshot.visits.iter();
        let visits = visits.map(|it| (it.actor.thread.0, it.access, it.inside));
        let expected = self.model.visits.iter();
        assert!(visits.eq(expected.map(|it| (it.thread, it.access, it.inside))));
        for (index, event) in snapshot.events.iter().enumerate() {
            assert_eq!(event.seq, snapshot.dropped_events + index as u64);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // Seeds of failures belong into a separate test, not into a file beside this one.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_registry_does_what_the_model_does(calls in prop::collection::vec(call(), 1..80)) {
        let mut both = Both {
            real: registry(),
            model: Model::default(),
            tickets: vec![],
            leases: vec![],
            visits: vec![],
        };
        for call in &calls {
            let generations: Vec<_> = both.real.snapshot().slots;
            let (epoch, good) = (both.real.slots_epoch(), both.good_leases());
            let (real, model) = both.call(call);
            prop_assert_eq!(real, model, "{:?}", call);
            both.assert_same_state();
            if both.real.slots_epoch() == epoch {
                // A released lease is no longer good, without a change of the epoch.
                let released = matches!(call, Call::Release { .. });
                prop_assert!(released || both.good_leases().starts_with(&good), "{:?}", call);
            }
            for before in generations {
                let after = both.real.snapshot();
                let after = after.slot(&before.key).map(|it| it.generation);
                prop_assert!(after.is_none_or(|after| after >= before.generation));
            }
        }
    }
}
