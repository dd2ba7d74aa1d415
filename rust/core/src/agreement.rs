//! What the ranks of one world agreed on, as one of them has read it: whose turn it is, what failed.
//! Pure: no store, no network; whoever talks to the other ranks hands the log's entries in.
//!
//! All ranks append to one log and read it from its start. An entry ends one stage of one round of one
//! name; what two ranks know after the same entries is the same, so that nobody has to ask a leader.
//!
//! ```text
//! stage   begins with                        ends with an entry that says
//! ask     a rank wants to create something   all ranks want it with equal specs | why not
//! turn    nobody else has the turn, and it   all ranks have created it          | which rank failed
//!         is the first ready one by name
//! build   whenever a rank has built with it  all ranks have                     | which rank failed
//! ```
//!
//! Invariants:
//! - Of several entries that end the same stage of the same round the first counts, on every rank.
//! - At most one round has the turn. The next is the first by name of those that are ready, not by
//!   arrival, and every rank finds the same one.
//! - In one process at most one living thread works under a name.
//! - At most one thread reads the log, and one does while anybody waits for what is open: with the
//!   last entry that somebody waits for it ends, and does not fall asleep over the next.
//!
//! Lock order: a leaf; nothing foreign runs under it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};
use crate::sync::{self, lock, Condvar, Mutex};

/// Which part of a round an entry ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// All ranks want the same.
    Ask,
    /// One after the other, what is created collectively is created.
    Turn,
    /// What was built with it is complete on every rank.
    Build,
}

impl Stage {
    /// Every stage there is.
    pub const ALL: [Self; 3] = [Self::Ask, Self::Turn, Self::Build];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ask => "ask",
            Self::Turn => "turn",
            Self::Build => "build",
        })
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|it| it.to_string() == text);
        found.ok_or_else(|| format!("unknown stage {text:?}; known: ask, turn, build"))
    }
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What the ranks create.
    pub name: String,
    /// How often they had tried before.
    pub round: u64,
    /// What has ended.
    pub stage: Stage,
    /// Why it ended badly; None when it ended well.
    pub failure: Option<String>,
}

/// How a stage stands for this rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is decided.
    Open,
    /// Go on.
    Passed,
    /// It ended badly, for all ranks.
    Failed(String),
}

#[derive(Debug, Default)]
struct Round {
    number: u64,
    ended: BTreeMap<Stage, Option<String>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The entry to read next.
    next: u64,
    /// The latest round of every name that an entry was about.
    rounds: BTreeMap<String, Round>,
    /// Agreed and not created yet: name and round, the first by name goes first.
    ready: BTreeMap<String, u64>,
    turn: Option<(String, u64)>,
    /// Who works here under which name.
    working: BTreeMap<String, Actor>,
    /// Which stages of a name's latest rounds this rank has told the others about.
    told: BTreeMap<String, BTreeSet<(u64, Stage)>>,
    /// What is waited for, once for each who does.
    waiting: Vec<(String, u64, Stage)>,
    reading: bool,
    lost: Option<String>,
}

/// One rank's view of one world.
#[derive(Debug, Default)]
pub struct Agreement {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Agreement {
    /// Nothing was read yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// `actor` works under `name` from now on; returns the number of its round. Refused while
    /// another living thread works under that name: the ranks could not tell them apart.
    /// `is_alive` runs unlocked, as in `Scopes::publish`; if it fails, nothing has changed.
    pub fn begin<E>(
        &self,
        name: &str,
        actor: &Actor,
        is_alive: impl Fn(ThreadId) -> Result<bool, E>,
    ) -> Result<Result<u64, Actor>, E> {
        loop {
            let other = lock(&self.inner).working.get(name).cloned();
            if let Some(other) = other.as_ref().filter(|it| it.thread != actor.thread) {
                if is_alive(other.thread)? {
                    return Ok(Err(other.clone()));
                }
            }
            let mut inner = lock(&self.inner);
            // The answer is about whom it was asked for, and nobody else.
            if inner.working.get(name) == other.as_ref() {
                return Ok(Ok(inner.begin(name, actor)));
            }
        }
    }

    /// Nobody works here under `name` any more.
    pub fn end(&self, name: &str) {
        lock(&self.inner).working.remove(name);
    }

    /// This rank tells the others how `stage` went for it; false when it has told them before.
    pub fn arrive(&self, name: &str, round: u64, stage: Stage) -> bool {
        let mut inner = lock(&self.inner);
        let told = inner.told.entry(name.to_owned()).or_default();
        told.insert((round, stage))
    }

    /// The number of the entry that was not read yet.
    pub fn next(&self) -> u64 {
        lock(&self.inner).next
    }

    /// Takes entry `index` in; false, and nothing happens, unless it is the next one.
    pub fn apply(&self, index: u64, entry: Entry) -> bool {
        let mut inner = lock(&self.inner);
        if inner.next != index {
            return false;
        }
        inner.next += 1;
        inner.apply(entry);
        drop(inner);
        self.changed.notify_all();
        true
    }

    /// The log cannot be read any more, for `reason`: every stage that is open has failed.
    pub fn lose(&self, reason: &str) {
        lock(&self.inner).lost = Some(reason.to_owned());
        self.changed.notify_all();
    }

    /// How `stage` of a round stands. An ask is passed when the round has the turn.
    pub fn stands(&self, name: &str, round: u64, stage: Stage) -> Standing {
        let inner = lock(&self.inner);
        if let Some(standing) = inner.stands(name, round, stage) {
            return standing;
        }
        inner.lost.clone().map_or(Standing::Open, Standing::Failed)
    }

    /// One more waits for the end of `stage` of a round. True when the caller must see to it that
    /// somebody reads.
    pub fn begin_wait(&self, name: &str, round: u64, stage: Stage) -> bool {
        let mut inner = lock(&self.inner);
        inner.waiting.push((name.to_owned(), round, stage));
        inner.is_awaited() && !std::mem::replace(&mut inner.reading, true)
    }

    /// One less waits for it.
    pub fn end_wait(&self, name: &str, round: u64, stage: Stage) {
        let mut inner = lock(&self.inner);
        let same = |it: &(String, u64, Stage)| it.0 == name && (it.1, it.2) == (round, stage);
        if let Some(index) = inner.waiting.iter().position(same) {
            inner.waiting.swap_remove(index);
        }
    }

    /// What the reader reads next; None when nobody waits: then it is the reader no more.
    pub fn next_to_read(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        inner.reading = inner.is_awaited();
        inner.reading.then_some(inner.next)
    }

    /// Whether a thread reads the log.
    pub fn is_reading(&self) -> bool {
        lock(&self.inner).reading
    }

    /// Sleeps until `stage` of a round may have ended, at most `slice`. May return early.
    pub fn wait(&self, name: &str, round: u64, stage: Stage, slice: Duration) {
        let inner = lock(&self.inner);
        if inner.lost.is_none() && inner.stands(name, round, stage).is_none() {
            drop(sync::wait_timeout(&self.changed, inner, slice));
        }
    }
}

impl Inner {
    fn begin(&mut self, name: &str, actor: &Actor) -> u64 {
        self.working.insert(name.to_owned(), actor.clone());
        let told = self.told.entry(name.to_owned()).or_default();
        // A round that this rank has told of is over for it, also when it gave up reading.
        let over = self.rounds.get(name).map(|round| round.number);
        let over = over.max(told.last().map(|(round, _)| *round));
        let number = over.map_or(0, |round| round + 1);
        told.retain(|(round, _)| round + 1 >= number);
        number
    }

    fn apply(&mut self, entry: Entry) {
        let round = self.rounds.entry(entry.name.clone()).or_default();
        if entry.round > round.number {
            *round = Round {
                number: entry.round,
                ended: BTreeMap::new(),
            };
            // Whoever is in an earlier round of this name has been left by another rank.
            self.ready.remove(&entry.name);
            self.turn.take_if(|(name, _)| *name == entry.name);
        }
        if entry.round < round.number || round.ended.contains_key(&entry.stage) {
            return;
        }
        let agreed = entry.stage == Stage::Ask
            && entry.failure.is_none()
            && !round.ended.contains_key(&Stage::Turn);
        round.ended.insert(entry.stage, entry.failure);
        if agreed {
            self.ready.insert(entry.name, entry.round);
        } else if entry.stage == Stage::Turn {
            self.ready
                .retain(|name, it| (name, *it) != (&entry.name, entry.round));
            self.turn.take_if(|it| *it == (entry.name, entry.round));
        }
        if self.turn.is_none() {
            self.turn = self.ready.pop_first();
        }
    }

    /// Whether an entry is waited for that may still come.
    fn is_awaited(&self) -> bool {
        let is_open = |it: &(String, u64, Stage)| self.stands(&it.0, it.1, it.2).is_none();
        self.lost.is_none() && self.waiting.iter().any(is_open)
    }

    fn stands(&self, name: &str, round: u64, stage: Stage) -> Option<Standing> {
        let known = self.rounds.get(name)?;
        if known.number > round {
            // Only when this rank stopped waiting and another round began since.
            return Some(Standing::Failed("overtaken by a later round".to_owned()));
        }
        if known.number < round {
            return None;
        }
        let ended = known.ended.get(&stage)?;
        if let Some(failure) = ended {
            return Some(Standing::Failed(failure.clone()));
        }
        if stage != Stage::Ask {
            return Some(Standing::Passed);
        }
        if let Some(Some(failure)) = known.ended.get(&Stage::Turn) {
            // Others had the turn and gave up before this rank noticed.
            return Some(Standing::Failed(failure.clone()));
        }
        let turn = self.turn.as_ref();
        if turn.is_none_or(|(it, number)| it != name || *number != round) {
            return None;
        }
        Some(Standing::Passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, round: u64, stage: Stage, failure: Option<&str>) -> Entry {
        Entry {
            name: name.into(),
            round,
            stage,
            failure: failure.map(Into::into),
        }
    }

    fn read(agreement: &Agreement, entries: &[Entry]) {
        for entry in entries {
            assert!(agreement.apply(agreement.next(), entry.clone()));
        }
    }

    fn actor(thread: u64) -> Actor {
        Actor {
            thread: ThreadId(thread),
            thread_name: format!("t{thread}"),
            runner: None,
        }
    }

    fn begin(agreement: &Agreement, thread: u64, alive: &[ThreadId]) -> Result<u64, Actor> {
        let begun: Result<_, ()> =
            agreement.begin("a", &actor(thread), |other| Ok(alive.contains(&other)));
        begun.expect("everybody can tell who lives")
    }

    #[test]
    fn the_first_that_is_ready_has_the_turn_and_after_it_the_first_by_name() {
        let ranks = Agreement::new();
        read(
            &ranks,
            &["m", "z", "a"].map(|name| entry(name, 0, Stage::Ask, None)),
        );
        assert_eq!(ranks.stands("m", 0, Stage::Ask), Standing::Passed);
        assert_eq!(ranks.stands("a", 0, Stage::Ask), Standing::Open);
        read(&ranks, &[entry("m", 0, Stage::Turn, None)]);
        assert_eq!(ranks.stands("a", 0, Stage::Ask), Standing::Passed);
        assert_eq!(ranks.stands("z", 0, Stage::Ask), Standing::Open);
        assert_eq!(ranks.stands("m", 0, Stage::Turn), Standing::Passed);
    }

    #[test]
    fn of_two_entries_about_the_same_stage_the_first_counts() {
        let ranks = Agreement::new();
        let gave_up = entry("a", 0, Stage::Ask, Some("rank 1 gave up"));
        read(&ranks, &[gave_up, entry("a", 0, Stage::Ask, None)]);
        let failed = Standing::Failed("rank 1 gave up".into());
        assert_eq!(ranks.stands("a", 0, Stage::Ask), failed);
        read(&ranks, &[entry("b", 0, Stage::Ask, None)]);
        assert_eq!(ranks.stands("b", 0, Stage::Ask), Standing::Passed);
    }

    #[test]
    fn a_failed_turn_passes_on_and_its_name_may_be_asked_for_again() {
        let ranks = Agreement::new();
        assert_eq!(begin(&ranks, 1, &[]), Ok(0));
        read(
            &ranks,
            &[
                entry("a", 0, Stage::Ask, None),
                entry("b", 0, Stage::Ask, None),
                entry("a", 0, Stage::Turn, Some("rank 0 failed")),
            ],
        );
        assert_eq!(ranks.stands("b", 0, Stage::Ask), Standing::Passed);
        assert_eq!(begin(&ranks, 1, &[]), Ok(1));
        assert_eq!(ranks.stands("a", 1, Stage::Ask), Standing::Open);
        read(&ranks, &[entry("b", 0, Stage::Turn, None)]);
        read(&ranks, &[entry("a", 1, Stage::Ask, None)]);
        assert_eq!(ranks.stands("a", 1, Stage::Ask), Standing::Passed);
    }

    #[test]
    fn what_is_ready_and_given_up_before_its_turn_never_has_it() {
        let ranks = Agreement::new();
        read(
            &ranks,
            &[
                entry("a", 0, Stage::Ask, None),
                entry("b", 0, Stage::Ask, None),
                entry("b", 0, Stage::Turn, Some("rank 1 was interrupted")),
                entry("a", 0, Stage::Turn, None),
                entry("c", 0, Stage::Ask, None),
            ],
        );
        assert_eq!(ranks.stands("c", 0, Stage::Ask), Standing::Passed);
        assert!(matches!(
            ranks.stands("b", 0, Stage::Turn),
            Standing::Failed(_)
        ));
    }

    #[test]
    fn two_living_threads_do_not_work_under_one_name() {
        let ranks = Agreement::new();
        let alive = [ThreadId(1), ThreadId(2)];
        assert_eq!(begin(&ranks, 1, &alive), Ok(0));
        assert_eq!(begin(&ranks, 2, &alive), Err(actor(1)));
        assert_eq!(begin(&ranks, 1, &alive), Ok(0));
        assert_eq!(begin(&ranks, 2, &alive[1..]), Ok(0));
        ranks.end("a");
        assert_eq!(begin(&ranks, 1, &alive), Ok(0));
    }

    #[test]
    fn a_thread_that_begins_while_its_predecessor_is_found_dead_keeps_the_name() {
        let ranks = Agreement::new();
        assert_eq!(begin(&ranks, 1, &[]), Ok(0));
        let third = ThreadId(3);
        let begun: Result<_, ()> = ranks.begin("a", &actor(2), |other| {
            if other != third {
                assert_eq!(begin(&ranks, 3, &[]), Ok(0));
            }
            Ok(other == third)
        });
        assert_eq!(begun, Ok(Err(actor(3))));
    }

    #[test]
    fn a_rank_tells_the_others_once_how_a_stage_went() {
        let ranks = Agreement::new();
        assert_eq!(begin(&ranks, 1, &[]), Ok(0));
        assert!(ranks.arrive("a", 0, Stage::Build));
        assert!(!ranks.arrive("a", 0, Stage::Build));
        assert!(ranks.arrive("a", 0, Stage::Turn));
        read(&ranks, &[entry("a", 0, Stage::Ask, Some("failed"))]);
        assert_eq!(begin(&ranks, 1, &[]), Ok(1));
        assert!(!ranks.arrive("a", 0, Stage::Build));
        assert!(ranks.arrive("a", 1, Stage::Build));
    }

    #[test]
    fn a_round_that_this_rank_told_of_is_over_for_it_also_when_it_did_not_read_how_it_ended() {
        let ranks = Agreement::new();
        assert_eq!(begin(&ranks, 1, &[]), Ok(0));
        assert!(ranks.arrive("a", 0, Stage::Ask));
        ranks.end("a");
        assert_eq!(begin(&ranks, 1, &[]), Ok(1));
        // Not told of: the others may be in it.
        assert_eq!(begin(&ranks, 1, &[]), Ok(1));
    }

    #[test]
    fn entries_are_taken_in_order_and_once() {
        let ranks = Agreement::new();
        let ready = entry("a", 0, Stage::Ask, None);
        let taken = [1, 0, 0].map(|index| ranks.apply(index, ready.clone()));
        assert_eq!((taken, ranks.next()), ([false, true, false], 1));
    }

    #[test]
    fn one_thread_reads_until_nothing_is_open_that_anybody_waits_for() {
        let ranks = Agreement::new();
        assert!(ranks.begin_wait("a", 0, Stage::Ask));
        assert!(!ranks.begin_wait("b", 0, Stage::Ask));
        assert_eq!(ranks.next_to_read(), Some(0));
        read(&ranks, &[entry("a", 0, Stage::Ask, None)]);
        assert_eq!(ranks.next_to_read(), Some(1));
        ranks.end_wait("b", 0, Stage::Ask);
        assert!(ranks.is_reading());
        // Whoever waits for "a" has not noticed yet that it came.
        assert_eq!(ranks.next_to_read(), None);
        assert!(!ranks.is_reading());
        assert!(!ranks.begin_wait("a", 0, Stage::Ask));
        assert!(ranks.begin_wait("a", 0, Stage::Turn));
    }

    #[test]
    fn a_lost_log_fails_what_is_open_and_nothing_else() {
        let ranks = Agreement::new();
        read(&ranks, &[entry("a", 0, Stage::Ask, None)]);
        ranks.lose("connection refused");
        assert_eq!(ranks.stands("a", 0, Stage::Ask), Standing::Passed);
        let lost = Standing::Failed("connection refused".into());
        assert_eq!(ranks.stands("a", 0, Stage::Turn), lost);
        assert_eq!(ranks.stands("b", 0, Stage::Ask), lost);
        assert!(!ranks.begin_wait("a", 0, Stage::Turn));
        assert_eq!(ranks.next_to_read(), None);
    }
}
