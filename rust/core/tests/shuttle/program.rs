//! A random program: threads that lead, join, hold, tear down and visit phases in any order, and
//! check every answer of the registry.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::Arc;
use std::time::Duration;

use distguard_core::enter::Entry;
use distguard_core::error::Error;
use distguard_core::guard::LeadGuard;
use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::phases::{Access, Phase, RunnerId, VisitId};
use distguard_core::policy::Policy;
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Ticket};
use distguard_core::snapshot::SlotState;
use distguard_core::teardown::Teardown;
use shuttle::rand::{thread_rng, Rng};
use shuttle::thread;

use crate::common::{actor, groups, registry, spec, FOREVER};
use crate::truth::{Counts, Truth};

const STEPS: u32 = 12;

fn any_key() -> Key {
    if thread_rng().gen_bool(0.5) {
        Key::World
    } else {
        groups("a")
    }
}

/// Runs one program on its own registry, and checks the state that it leaves behind.
pub fn run(threads: u64, counts: &Arc<Counts>) {
    let (registry, truth) = (Arc::new(registry()), Arc::new(Truth::default()));
    let start = |id| {
        let (registry, truth, counts) = (registry.clone(), truth.clone(), counts.clone());
        thread::spawn(move || {
            let mut worker = Worker {
                id,
                registry: &registry,
                truth: &truth,
                counts: &counts,
                leads: vec![],
                leases: vec![],
                visits: vec![],
            };
            for _ in 0..STEPS {
                worker.step();
            }
            worker.give_everything_back()
        })
    };
    let workers: Vec<_> = (0..threads).map(start).collect();
    let leases: Vec<_> = workers
        .into_iter()
        .flat_map(|worker| worker.join().unwrap())
        .collect();
    truth.assert_nothing_is_left();
    let snapshot = registry.snapshot();
    assert!(snapshot.visits.is_empty());
    for slot in &snapshot.slots {
        assert_eq!(slot.waiters, 0);
        assert!(!matches!(slot.state, SlotState::Running { .. }));
        assert!(slot.generation >= truth.told(&slot.key));
    }
    // No lease is held, so the reset need not be forced.
    assert_eq!(registry.reset(&actor(0), false), Ok(()));
    for slot in registry.snapshot().slots {
        assert_eq!(slot.state, SlotState::Idle);
    }
    for (key, id) in leases {
        assert!(!registry.release(id));
        let checked = registry.check_leases(&[(key, id)]);
        assert!(matches!(checked, Err(Error::LeaseBroken { by: None, .. })));
    }
}

struct Lead<'a> {
    key: Key,
    guard: LeadGuard<'a>,
    /// The generation that is being torn down; None if the state is being made.
    torn: Option<u64>,
}

struct Lease {
    key: Key,
    id: LeaseId,
    generation: u64,
    /// Whether the registry has reported the state as gone.
    broken: bool,
}

struct Worker<'a> {
    id: u64,
    registry: &'a Registry,
    truth: &'a Truth,
    counts: &'a Counts,
    leads: Vec<Lead<'a>>,
    leases: Vec<Lease>,
    visits: Vec<(VisitId, Access)>,
}

impl Worker<'_> {
    fn step(&mut self) {
        match thread_rng().gen_range(0..27) {
            0..=5 => self.acquire(),
            6..=9 => self.resolve(),
            10..=14 => self.enter(),
            15..=17 => self.leave(),
            18..=20 => self.check_leases(),
            21 => self.release(),
            22 | 23 => self.tear_down(),
            24 => self.forget(),
            25 => self.reset(),
            _ => self.registry.wake_all(),
        }
    }

    fn acquire(&mut self) {
        let (mut random, key) = (thread_rng(), any_key());
        let request = Request {
            key: key.clone(),
            spec: spec(if random.gen_bool(0.85) { 1 } else { 2 }),
            policy: Policy {
                reuse: random.gen_bool(0.95),
                reentrant: random.gen_bool(0.5),
            },
            actor: actor(self.id),
            observed: match random.gen_range(0..12) {
                0 => Observed::Absent,
                1 => Observed::Present(random.gen_range(7..9)),
                _ => Observed::Unknown,
            },
            waited: Duration::ZERO,
            slow_after: FOREVER,
        };
        let (gone, told) = (self.truth.gone(&key), self.truth.told(&key));
        self.truth.asks(self.id, &key);
        let step = loop {
            match self.registry.try_acquire(&request) {
                Ok(Step::Wait { epoch, .. }) => {
                    self.counts.waits.fetch_add(1, Relaxed);
                    self.registry.wait(&request, epoch, FOREVER);
                }
                step => break step,
            }
        };
        if let Err(Error::Deadlock { cycle }) = &step {
            self.counts.deadlocks.fetch_add(1, Relaxed);
            self.truth.assert_cycle(self.id, cycle);
        }
        self.truth.asks_no_more(self.id);
        match step {
            Ok(Step::Lead(ticket) | Step::Adopt(ticket)) => self.lead(ticket, None),
            Ok(Step::Join { generation }) => {
                self.counts.joins.fetch_add(1, Relaxed);
                assert!(generation > gone && generation >= told);
                self.truth.tell(&key, generation);
                self.lease(key, generation);
            }
            Ok(Step::Nested) => assert_eq!(self.truth.leader(&key), Some(self.id)),
            Err(
                Error::Deadlock { .. }
                | Error::SpecMismatch { .. }
                | Error::ReuseForbidden { .. }
                | Error::Poisoned { .. },
            ) => {}
            other => panic!("{other:?}"),
        }
    }

    fn lead(&mut self, ticket: Ticket, torn: Option<u64>) {
        self.counts.leads.fetch_add(1, Relaxed);
        let key = ticket.key().clone();
        self.truth.leads(self.id, &key);
        let guard = LeadGuard::new(self.registry, ticket);
        self.leads.push(Lead { key, guard, torn });
    }

    fn lease(&mut self, key: Key, generation: u64) {
        let gone = self.truth.gone(&key);
        let wanted = [(key.clone(), generation)];
        match self.registry.lease_at(&wanted, "a", &actor(self.id)) {
            Ok(ids) => {
                assert!(generation > gone, "{key} {generation} is gone");
                self.leases.push(Lease {
                    key,
                    id: ids[0],
                    generation,
                    broken: false,
                });
            }
            Err(error) => assert_eq!(error, Error::NotReady { key }),
        }
    }

    fn resolve(&mut self) {
        if self.leads.is_empty() {
            return;
        }
        let index = thread_rng().gen_range(0..self.leads.len());
        let Lead { key, guard, torn } = self.leads.swap_remove(index);
        let told = self.truth.told(&key);
        self.truth.leads_no_more(self.id, &key);
        match (thread_rng().gen_range(0..10), torn) {
            (0, _) => drop(guard),
            (1, _) => assert!(guard.fail("boom")),
            (2, torn) => {
                assert!(guard.poison("half"));
                self.truth.is_gone(&key, torn.unwrap_or(0));
            }
            (_, None) => {
                let origin = Origin::Created;
                let generation = guard.publish(spec(1), origin, 7).expect("it leads");
                assert!(generation > told);
                self.truth.tell(&key, generation);
                self.lease(key, generation);
            }
            (_, Some(torn)) => {
                assert!(guard.end_teardown());
                self.truth.is_gone(&key, torn);
            }
        }
    }

    fn enter(&mut self) {
        if self.visits.len() > 1 {
            return self.leave();
        }
        let access = any_access();
        let impatient = thread_rng().gen_bool(0.1);
        self.truth.asks(self.id, &access);
        let entered = self.wait_to_enter(access, impatient);
        if let Err(Error::Deadlock { cycle }) = &entered {
            self.counts.deadlocks.fetch_add(1, Relaxed);
            self.truth.assert_cycle(self.id, cycle);
        }
        self.truth.asks_no_more(self.id);
        match entered {
            Ok(visit) => {
                self.counts.visits.fetch_add(1, Relaxed);
                self.truth.enters(self.id, access);
                self.visits.push((visit, access));
            }
            Err(Error::Deadlock { .. } | Error::PhaseTimeout { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn wait_to_enter(&self, access: Access, impatient: bool) -> Result<VisitId, Error> {
        let (visit, mut entry) = self.registry.arrive(access, &actor(self.id))?;
        while let Entry::Wait { epoch, .. } = entry {
            if impatient {
                let error = self.registry.phase_timed_out(visit, FOREVER);
                self.truth.times_out(self.id);
                return Err(error);
            }
            self.counts.waits.fetch_add(1, Relaxed);
            self.registry.wait_to_enter(visit, epoch, FOREVER);
            entry = self.registry.try_enter(visit)?;
        }
        Ok(visit)
    }

    fn leave(&mut self) {
        if let Some((visit, access)) = self.visits.pop() {
            self.truth.leaves(self.id, access);
            assert!(self.registry.leave(visit));
        }
    }

    fn check_leases(&mut self) {
        for lease in &mut self.leases {
            let gone = self.truth.gone(&lease.key);
            match self.registry.check_leases(&[(lease.key.clone(), lease.id)]) {
                Ok(()) => assert!(lease.generation > gone && !lease.broken),
                Err(Error::LeaseBroken {
                    by: Some(_), how, ..
                }) => {
                    self.counts.broken.fetch_add(1, Relaxed);
                    // A teardown that fails leaves everything as it was, leases too.
                    lease.broken |= how != "is tearing it down by force";
                }
                other => panic!("the lease was not released: {other:?}"),
            }
        }
    }

    fn release(&mut self) {
        if let Some(lease) = self.leases.pop() {
            let was_good = self.registry.release(lease.id);
            assert!(!(was_good && lease.broken));
        }
    }

    fn tear_down(&mut self) {
        let (key, force) = (any_key(), thread_rng().gen_bool(0.5));
        match self.registry.begin_teardown(&key, &actor(self.id), force) {
            Ok(Teardown::Begun { ticket, broken, .. }) => {
                assert!(force || broken.is_empty());
                self.lead(ticket, Some(self.generation(&key)));
            }
            Ok(Teardown::Nothing) | Err(Error::Busy { .. }) => {}
            Err(Error::InUse { .. }) => assert!(!force),
            Err(error) => panic!("{error}"),
        }
    }

    fn generation(&self, key: &Key) -> u64 {
        let snapshot = self.registry.snapshot();
        snapshot.slot(key).map_or(0, |slot| slot.generation)
    }

    fn forget(&mut self) {
        let key = any_key();
        let generation = self.generation(&key);
        if self.registry.forget(&key) {
            self.truth.is_gone(&key, generation);
        }
        // Also removes all that is known about the key; its generations continue.
        if thread_rng().gen_bool(0.3) && self.registry.remove(&key) {
            self.truth.is_gone(&key, generation);
        }
    }

    fn reset(&mut self) {
        let force = thread_rng().gen_bool(0.5);
        let keys = [Key::World, groups("a")].map(|key| {
            let generation = self.generation(&key);
            (key, generation)
        });
        match self.registry.reset(&actor(self.id), force) {
            Ok(()) => {
                for (key, generation) in keys {
                    self.truth.is_gone(&key, generation);
                }
            }
            Err(Error::Busy { .. }) => {}
            Err(Error::InUse { .. }) => assert!(!force),
            Err(error) => panic!("{error}"),
        }
    }

    /// Returns the leases that it held last, which the registry must not know any more.
    fn give_everything_back(mut self) -> Vec<(Key, LeaseId)> {
        while !self.leads.is_empty() {
            self.resolve();
        }
        while !self.visits.is_empty() {
            self.leave();
        }
        self.check_leases();
        let leases = std::mem::take(&mut self.leases);
        for lease in &leases {
            let was_good = self.registry.release(lease.id);
            assert!(!(was_good && lease.broken));
        }
        leases.into_iter().map(|it| (it.key, it.id)).collect()
    }
}

/// An access of no particular runner, or of one of three; the third is a draft of the first.
fn any_access() -> Access {
    let phase = Phase::ALL[thread_rng().gen_range(0..3)];
    let runner = match thread_rng().gen_range(0..4u64) {
        0 => None,
        number => Some(RunnerId(number)),
    };
    let target = (runner == Some(RunnerId(3))).then_some(RunnerId(1));
    Access {
        phase,
        runner,
        target,
    }
}
