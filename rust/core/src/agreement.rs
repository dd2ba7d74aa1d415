//! What the ranks of one world agreed on, as one rank has read it: which round has the turn, what
//! failed. Pure: no store, no network; the caller reads the shared log and passes in its entries.
//!
//! All ranks append to one shared log and read it from its start. An entry ends one stage of one
//! round of one name. After the same entries, two ranks know the same: no rank has to ask a leader.
//!
//! ```text
//! stage   begins with                        ends with
//! ask     a rank wants to create something   an entry: all ranks want it with equal specs | why not
//! begin   the ask passed                     no entry: no other round has the turn, and of the
//!                                            ready rounds it is the first by name
//! turn    the turn                           an entry: all ranks have created it | which rank failed
//! build   a rank has built with it           an entry: all ranks have built | which rank failed
//! ```
//!
//! Invariants:
//! - Of several entries that end the same stage of the same round the first counts, on every rank.
//! - At most one round has the turn. The next is the first by name of the ready rounds, not by
//!   arrival, and every rank finds the same one.
//! - A round keeps the turn until an entry about its own turn, even if some rank has gone on to a
//!   later round of that name: another rank may still be inside.
//! - A rank enters a turn only when it has left the one before, which other ranks may have aborted.
//!   So its effects there are undone before the next turn begins here.
//! - In one process at most one living thread works under a name.
//! - At most one thread reads the log, and one does while any thread waits for an open stage. It
//!   ends with the last entry that is waited for, instead of sleeping until another one comes.
//!
//! Lock order: a leaf; no foreign code runs under it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};
use crate::sync::{self, lock, Condvar, Mutex};

/// The part of a round that an entry ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// All ranks want the same.
    Ask,
    /// Waiting for the turn. No entry is written for it.
    Begin,
    /// The ranks create something collectively, one round after the other.
    Turn,
    /// The build that uses it is complete on every rank.
    Build,
}

impl Stage {
    /// All stages.
    pub const ALL: [Self; 4] = [Self::Ask, Self::Begin, Self::Turn, Self::Build];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ask => "ask",
            Self::Begin => "begin",
            Self::Turn => "turn",
            Self::Build => "build",
        })
    }
}

impl FromStr for Stage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|it| it.to_string() == text);
        found.ok_or_else(|| format!("unknown stage {text:?}; known: ask, begin, turn, build"))
    }
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name under which the ranks create something.
    pub name: String,
    /// How often they had tried it before.
    pub round: u64,
    /// The stage that has ended.
    pub stage: Stage,
    /// Why it failed; None when it passed.
    pub failure: Option<String>,
}

/// The status of a stage for this rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is not decided yet.
    Open,
    /// It passed, for all ranks.
    Passed,
    /// It failed, for all ranks.
    Failed(String),
}

#[derive(Debug, Default)]
struct Round {
    number: u64,
    /// How each stage ended, and the index of its entry.
    ended: BTreeMap<Stage, (Option<String>, u64)>,
    /// Whether it has had the turn.
    began: bool,
    /// The round before: its waiters may look at it after this one has begun.
    before: Option<Box<Round>>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The entry to read next.
    next: u64,
    /// The latest round of every name that has an entry.
    rounds: BTreeMap<String, Round>,
    /// Rounds that are agreed and not created yet, by name; the first by name goes first.
    ready: BTreeMap<String, u64>,
    turn: Option<(String, u64)>,
    /// The round whose turn this rank has entered and not left.
    inside: Option<(String, u64)>,
    /// The thread that works in this process under each name.
    working: BTreeMap<String, Actor>,
    /// The stages of a name's latest rounds that this rank has reported to the others.
    told: BTreeMap<String, BTreeSet<(u64, Stage)>>,
    /// The stages that are waited for, once for each waiting thread.
    waiting: Vec<(String, u64, Stage)>,
    reading: bool,
    /// Entries that this rank wrote and that may still be in the log.
    wrote: BTreeSet<u64>,
    /// Entries that this rank has read in the log and wrote itself.
    read_own: BTreeSet<u64>,
    lost: Option<String>,
}

/// One rank's view of one world.
#[derive(Debug, Default)]
pub struct Agreement {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Agreement {
    /// An agreement of which no entry was read yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Records that `actor` works under `name`; returns the number of its round. Refused while
    /// another living thread works under that name: the ranks could not tell them apart.
    /// `is_alive` runs without the lock; if it fails, nothing has changed.
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
            // The answer is only about `other`.
            if inner.working.get(name) == other.as_ref() {
                return Ok(Ok(inner.begin(name, actor)));
            }
        }
    }

    /// Records that no thread of this process works under `name` any more.
    pub fn end(&self, name: &str) {
        lock(&self.inner).working.remove(name);
    }

    /// Records that this rank reports to the others how `stage` went. False when it already had.
    pub fn arrive(&self, name: &str, round: u64, stage: Stage) -> bool {
        let mut inner = lock(&self.inner);
        let told = inner.told.entry(name.to_owned()).or_default();
        told.insert((round, stage))
    }

    /// The index of the entry to read next.
    pub fn next(&self) -> u64 {
        lock(&self.inner).next
    }

    /// Applies entry `index`. False, and nothing changes, unless it is the next one.
    pub fn apply(&self, index: u64, entry: Entry) -> bool {
        let mut inner = lock(&self.inner);
        if inner.next != index {
            return false;
        }
        inner.next += 1;
        inner.apply(index, entry);
        drop(inner);
        self.changed.notify_all();
        true
    }

    /// Records that the log cannot be read any more, for `reason`: every open stage has failed.
    pub fn lose(&self, reason: &str) {
        lock(&self.inner).lost = Some(reason.to_owned());
        self.changed.notify_all();
    }

    /// The round that has the turn.
    pub fn turn(&self) -> Option<(String, u64)> {
        lock(&self.inner).turn.clone()
    }

    /// The status of a round's begin stage. If it passed, this rank is now inside the round's turn.
    pub fn enter(&self, name: &str, round: u64) -> Standing {
        let mut inner = lock(&self.inner);
        let standing = inner.standing(name, round, Stage::Begin);
        if standing == Standing::Passed {
            inner.inside = Some((name.to_owned(), round));
        }
        standing
    }

    /// Records that this rank has left a round's turn, if it was inside, after its undo work there.
    pub fn leave(&self, name: &str, round: u64) {
        let mut inner = lock(&self.inner);
        inner
            .inside
            .take_if(|it| (it.0.as_str(), it.1) == (name, round));
        drop(inner);
        self.changed.notify_all();
    }

    /// Whether a round has had the turn, so that some rank may have been inside; None when the
    /// entries read so far do not tell.
    pub fn began(&self, name: &str, round: u64) -> Option<bool> {
        let inner = lock(&self.inner);
        let round = inner.round(name, round)?;
        let refused = matches!(round.ended.get(&Stage::Ask), Some((Some(_), _)));
        if round.began {
            return Some(true);
        }
        (refused || round.ended.contains_key(&Stage::Turn)).then_some(false)
    }

    /// Records that this rank has read entry `index` and wrote it itself. Call it before `apply`.
    pub fn read_own(&self, index: u64) {
        lock(&self.inner).read_own.insert(index);
    }

    /// Records that this rank wrote entry `index`. False when no rank will read it: since this rank
    /// asked where to write, all ranks have read the entry that stood there, and it was deleted.
    /// Also false when all ranks have read the new entry itself meanwhile. Then it may be written
    /// once more, because a second entry of a stage does not count.
    #[must_use]
    pub fn wrote(&self, index: u64) -> bool {
        let mut inner = lock(&self.inner);
        // A deleted entry has been read by every rank, so by this one. No two threads of a rank
        // write the same text: one thread works under a name, and a stage is ended once.
        if index < inner.next && !inner.read_own.remove(&index) {
            return false;
        }
        inner.wrote.insert(index);
        true
    }

    /// The entries of this rank that no rank will read again: all ranks have reported `stage`, so
    /// all have read the entries that had to be known before. Each is returned once.
    pub fn outlived(&self, name: &str, round: u64, stage: Stage) -> Vec<u64> {
        let before = match stage {
            Stage::Turn => Stage::Ask,
            Stage::Build => Stage::Turn,
            // A rank that asks again may have left the round before without reading how it ended.
            Stage::Ask | Stage::Begin => return Vec::new(),
        };
        let mut inner = lock(&self.inner);
        let known = inner.rounds.get(name).filter(|it| it.number == round);
        let Some(&(_, index)) = known.and_then(|it| it.ended.get(&before)) else {
            return Vec::new();
        };
        inner.read_own = inner.read_own.split_off(&(index + 1));
        let later = inner.wrote.split_off(&(index + 1));
        std::mem::replace(&mut inner.wrote, later)
            .into_iter()
            .collect()
    }

    /// The status of `stage` of a round.
    pub fn stands(&self, name: &str, round: u64, stage: Stage) -> Standing {
        lock(&self.inner).standing(name, round, stage)
    }

    /// Records one more waiter for the end of `stage` of a round. True when the caller must start a
    /// thread that reads the log.
    pub fn begin_wait(&self, name: &str, round: u64, stage: Stage) -> bool {
        let mut inner = lock(&self.inner);
        inner.waiting.push((name.to_owned(), round, stage));
        inner.is_awaited() && !std::mem::replace(&mut inner.reading, true)
    }

    /// Records one waiter less for the end of `stage` of a round.
    pub fn end_wait(&self, name: &str, round: u64, stage: Stage) {
        let mut inner = lock(&self.inner);
        let same = |it: &(String, u64, Stage)| it.0 == name && (it.1, it.2) == (round, stage);
        if let Some(index) = inner.waiting.iter().position(same) {
            inner.waiting.swap_remove(index);
        }
    }

    /// The entry that the reader reads next. None when no thread waits: then the reader ends.
    pub fn next_to_read(&self) -> Option<u64> {
        let mut inner = lock(&self.inner);
        inner.reading = inner.is_awaited();
        inner.reading.then_some(inner.next)
    }

    /// Records that the reading thread could not be started.
    pub fn end_reading(&self) {
        lock(&self.inner).reading = false;
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
        // A round that this rank has reported is over for it, even if it stopped reading.
        let over = self.rounds.get(name).map(|round| round.number);
        let over = over.max(told.last().map(|(round, _)| *round));
        let number = over.map_or(0, |round| round + 1);
        told.retain(|(round, _)| round + 1 >= number);
        number
    }

    fn apply(&mut self, index: u64, entry: Entry) {
        if entry.stage == Stage::Turn {
            self.turn
                .take_if(|it| (&it.0, it.1) == (&entry.name, entry.round));
        }
        self.end_stage(index, entry);
        if self.turn.is_none() {
            self.turn = self.ready.pop_first();
            if let Some((name, _)) = &self.turn {
                let round = self.rounds.get_mut(name);
                round.expect("a ready round was agreed on").began = true;
            }
        }
    }

    /// The first entry for a stage of a name's latest round counts.
    fn end_stage(&mut self, index: u64, entry: Entry) {
        let round = self.rounds.entry(entry.name.clone()).or_default();
        if entry.round > round.number {
            let mut before = std::mem::take(round);
            before.before = None;
            round.number = entry.round;
            round.before = Some(Box::new(before));
            // A rank has left the earlier round: a rank that got its turn would be alone.
            self.ready.remove(&entry.name);
        }
        let counts = entry.round == round.number && !round.ended.contains_key(&entry.stage);
        if entry.stage == Stage::Begin || !counts {
            return;
        }
        let agreed = entry.stage == Stage::Ask
            && entry.failure.is_none()
            && !round.ended.contains_key(&Stage::Turn);
        round.ended.insert(entry.stage, (entry.failure, index));
        if agreed {
            self.ready.insert(entry.name, entry.round);
        } else if entry.stage == Stage::Turn {
            self.ready.remove(&entry.name);
        }
    }

    /// Whether a thread waits for an entry that may still come.
    fn is_awaited(&self) -> bool {
        let is_open = |it: &(String, u64, Stage)| self.stands(&it.0, it.1, it.2).is_none();
        self.lost.is_none() && self.waiting.iter().any(is_open)
    }

    fn round(&self, name: &str, number: u64) -> Option<&Round> {
        let known = self.rounds.get(name)?;
        [Some(known), known.before.as_deref()]
            .into_iter()
            .flatten()
            .find(|it| it.number == number)
    }

    fn standing(&self, name: &str, round: u64, stage: Stage) -> Standing {
        self.stands(name, round, stage)
            .or_else(|| self.lost.clone().map(Standing::Failed))
            .unwrap_or(Standing::Open)
    }

    fn stands(&self, name: &str, round: u64, stage: Stage) -> Option<Standing> {
        let latest = self.rounds.get(name)?.number;
        if latest < round {
            return None;
        }
        let found = self
            .round(name, round)
            .and_then(|it| self.ended(name, it, stage));
        if found.is_none() && latest > round {
            // Another rank has left this round: none of its entries counts any more.
            return Some(Standing::Failed("overtaken by a later round".to_owned()));
        }
        found
    }

    fn ended(&self, name: &str, known: &Round, stage: Stage) -> Option<Standing> {
        if stage != Stage::Begin {
            let (failure, _) = known.ended.get(&stage)?;
            return Some(failure.clone().map_or(Standing::Passed, Standing::Failed));
        }
        // The turn comes, or another rank has aborted it before this rank noticed.
        for before in [Stage::Ask, Stage::Turn] {
            if let Some((Some(failure), _)) = known.ended.get(&before) {
                return Some(Standing::Failed(failure.clone()));
            }
        }
        let is_own = |it: &(String, u64)| it.0 == name && it.1 == known.number;
        let may_enter =
            self.turn.as_ref().is_some_and(is_own) && self.inside.as_ref().is_none_or(is_own);
        may_enter.then_some(Standing::Passed)
    }
}

#[cfg(test)]
mod tests;
