//! Facts about the threads of a program that do not come from the registry, so that its answers can
//! be checked. The thread that a fact is about writes it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use distguard_core::key::Key;
use distguard_core::phases::Access;
use distguard_core::waitgraph::{Edge, Subject};

/// Counts that show that the programs did what they should.
#[derive(Default)]
pub struct Counts {
    pub leads: AtomicUsize,
    pub joins: AtomicUsize,
    pub waits: AtomicUsize,
    pub deadlocks: AtomicUsize,
    pub broken: AtomicUsize,
    pub visits: AtomicUsize,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            leads,
            joins,
            waits,
            deadlocks,
            broken,
            visits,
        } = self;
        let [leads, joins, waits, deadlocks, broken, visits] =
            [leads, joins, waits, deadlocks, broken, visits].map(|it| it.load(Relaxed));
        write!(
            f,
            "{leads} leads, {joins} joins, {visits} visits, {waits} waits, {deadlocks} deadlocks \
             refused, {broken} leases broken"
        )
    }
}

#[derive(Default)]
struct Facts {
    leaders: BTreeMap<Key, u64>,
    inside: Vec<(u64, Access)>,
    /// The key or phase that a thread asks for, and may sleep for.
    asking: BTreeMap<u64, Subject>,
    /// The number of all asks so far, which serves as the time.
    asks: u64,
    /// The times when a thread last began to ask, and when it last timed out in line.
    asked: BTreeMap<u64, u64>,
    timed_out: BTreeMap<u64, u64>,
    /// Generations up to this are gone.
    gone: BTreeMap<Key, u64>,
    /// The latest generation that any thread was told.
    told: BTreeMap<Key, u64>,
}

/// The facts. Their lock is std's and never held during a call of the registry, so shuttle spends
/// no schedules on it.
#[derive(Default)]
pub struct Truth(Mutex<Facts>);

impl Truth {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap()
    }

    /// Called before the first try.
    pub fn asks(&self, thread: u64, subject: impl Into<Subject>) {
        let mut facts = self.facts();
        facts.asking.insert(thread, subject.into());
        facts.asks += 1;
        let now = facts.asks;
        facts.asked.insert(thread, now);
    }

    /// Its deadline has passed: a cycle that it was part of has opened by itself. Called after the
    /// thread has left the line.
    pub fn times_out(&self, thread: u64) {
        let mut facts = self.facts();
        let now = facts.asks;
        facts.timed_out.insert(thread, now);
    }

    pub fn asks_no_more(&self, thread: u64) {
        self.facts().asking.remove(&thread);
    }

    pub fn leads(&self, thread: u64, key: &Key) {
        let other = self.facts().leaders.insert(key.clone(), thread);
        assert_eq!(other, None, "two lead {key}");
    }

    /// Called before the lead ends.
    pub fn leads_no_more(&self, thread: u64, key: &Key) {
        let leader = self.facts().leaders.remove(key);
        assert_eq!(leader, Some(thread));
    }

    pub fn leader(&self, key: &Key) -> Option<u64> {
        self.facts().leaders.get(key).copied()
    }

    pub fn enters(&self, thread: u64, access: Access) {
        let mut facts = self.facts();
        for (other, occupied) in &facts.inside {
            let together = *other != thread && occupied.conflicts_with(&access);
            assert!(!together, "{other} is in {occupied}, {thread} in {access}");
        }
        facts.inside.push((thread, access));
    }

    /// Called before the visit ends.
    pub fn leaves(&self, thread: u64, access: Access) {
        let mut facts = self.facts();
        let visit = facts.inside.iter().position(|it| *it == (thread, access));
        facts.inside.remove(visit.expect("it is inside"));
    }

    pub fn gone(&self, key: &Key) -> u64 {
        self.facts().gone.get(key).copied().unwrap_or(0)
    }

    pub fn told(&self, key: &Key) -> u64 {
        self.facts().told.get(key).copied().unwrap_or(0)
    }

    /// The generation was torn down, forgotten or reset.
    pub fn is_gone(&self, key: &Key, generation: u64) {
        let mut facts = self.facts();
        let gone = facts.gone.entry(key.clone()).or_default();
        *gone = generation.max(*gone);
    }

    /// A thread was told the generation.
    pub fn tell(&self, key: &Key, generation: u64) {
        let mut facts = self.facts();
        let told = facts.told.entry(key.clone()).or_default();
        *told = generation.max(*told);
    }

    /// Every thread of the cycle asks for something that the next one has; `thread` is the first.
    pub fn assert_cycle(&self, thread: u64, cycle: &[Edge]) {
        let facts = self.facts();
        assert_eq!(cycle[0].thread.0, thread);
        let since = facts.asked[&thread];
        let timed_out = |edge: &Edge| facts.timed_out.get(&edge.thread.0) >= Some(&since);
        if cycle.iter().any(timed_out) {
            return;
        }
        for (index, edge) in cycle.iter().enumerate() {
            let next = cycle[(index + 1) % cycle.len()].thread.0;
            let asks = facts.asking.get(&edge.thread.0);
            assert_eq!(asks, Some(&edge.subject), "{cycle:?}");
            let has = match &edge.subject {
                Subject::Key(key) => facts.leaders.get(key) == Some(&next),
                Subject::Phase(access) => {
                    let mut visits = facts.inside.iter().filter(|it| it.0 == next);
                    next != edge.thread.0 && visits.any(|it| it.1.conflicts_with(access))
                }
            };
            assert!(has, "{next} does not have {}: {cycle:?}", edge.subject);
        }
    }

    pub fn assert_nothing_is_left(&self) {
        let facts = self.facts();
        assert!(facts.leaders.is_empty() && facts.inside.is_empty() && facts.asking.is_empty());
    }
}
