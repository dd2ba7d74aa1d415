//! The phase lock: phases of runners that may overlap run together, and the others wait.
//! A capture is alone in the process. A load excludes every other phase of the same runner.
//! Pure: it tells which visits are inside and which is next. The registry's one lock covers it, and
//! threads wait in the registry.
//!
//! ```text
//! from      by         to
//! -         arrive     Queued, last in line
//! -         arrive     Inside, when nothing that conflicts is inside or in line
//! Queued    enter      Inside, when nothing that conflicts is in the way
//! Queued    leave      -   (the wait ended: deadline, interrupt, deadlock)
//! Inside    leave      -
//! ```
//!
//! Invariants:
//! - Two threads are never Inside for accesses that conflict. A thread does not conflict with itself:
//!   a capture runs forwards.
//! - Phases that conflict are first come, first served, with one exception. A visit may overtake an
//!   earlier one that waits for it, directly or through other threads; strict FIFO would deadlock.
//!   So the line alone never causes a deadlock, and only visits Inside count as obstacles.
//!
//! Lock order: none here; see `slot`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};

/// A phase of a runner that may exclude phases of other threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// A runner is changed: its weights are loaded or its memory is allocated.
    Load,
    /// A model computes.
    Forward,
    /// A graph is captured: nothing else may allocate or launch meanwhile.
    Capture,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 3] = [Self::Load, Self::Forward, Self::Capture];

    /// Whether the phases exclude each other for all runners; see also `Access::conflicts_with`.
    fn conflicts_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Capture, _) | (_, Self::Capture) => true,
            (Self::Load | Self::Forward, Self::Load | Self::Forward) => false,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "phase:load",
            Self::Forward => "phase:forward",
            Self::Capture => "phase:capture",
        })
    }
}

impl FromStr for Phase {
    type Err = String;

    /// The name without "phase:".
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "load" => Ok(Self::Load),
            "forward" => Ok(Self::Forward),
            "capture" => Ok(Self::Capture),
            _ => Err(format!(
                "unknown phase {text:?}; known: load, forward, capture"
            )),
        }
    }
}

/// Identifies a runner, or another resident of a scope. A process never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunnerId(pub u64);

/// The purpose of a visit: a phase, and the runners that it concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access {
    /// The phase.
    pub phase: Phase,
    /// The runner that is in the phase. A load changes it, any other phase reads it.
    pub runner: Option<RunnerId>,
    /// The target if `runner` is a draft: every phase reads the target's weights.
    pub target: Option<RunnerId>,
}

impl Access {
    /// Whether two accesses of different threads exclude each other: the only table. Symmetric.
    pub fn conflicts_with(&self, other: &Self) -> bool {
        self.phase.conflicts_with(other.phase) || self.changes(other) || other.changes(self)
    }

    /// Whether this is a load of a runner that the other one reads or loads.
    fn changes(&self, other: &Self) -> bool {
        self.phase == Phase::Load
            && self.runner.is_some()
            && (other.runner == self.runner || other.target == self.runner)
    }
}

impl From<Phase> for Access {
    /// A phase of no runner in particular.
    fn from(phase: Phase) -> Self {
        Self {
            phase,
            runner: None,
            target: None,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.phase.fmt(f)
    }
}

/// Identifies one visit of one thread to one phase. A registry never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VisitId(pub u64);

/// One thread in a phase or in line for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Visit {
    /// The phase and the runners.
    pub access: Access,
    /// The runner's method in which the visit was made, if any.
    pub step: Option<Arc<str>>,
    /// The visiting thread and its runner.
    pub actor: Actor,
    /// When it entered or, while it is in line, when it arrived.
    pub since: Duration,
    /// Whether it is inside.
    pub inside: bool,
}

impl Visit {
    /// Whether this visit conflicts with `thread` entering for `access`.
    fn is_in_the_way(&self, access: Access, thread: ThreadId) -> bool {
        self.actor.thread != thread && self.access.conflicts_with(&access)
    }
}

/// Every visit, in the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct PhaseLock {
    visits: BTreeMap<VisitId, Visit>,
}

impl PhaseLock {
    /// Whether `thread` may enter for `access` at once: no conflicting visit is inside or in line.
    pub fn is_free(&self, access: Access, thread: ThreadId) -> bool {
        let mut visits = self.visits.values();
        !visits.any(|visit| visit.is_in_the_way(access, thread))
    }

    /// Adds a visit. `id` is higher than every earlier one; `inside` is true only if it `is_free`.
    pub fn arrive(
        &mut self,
        id: VisitId,
        access: Access,
        step: Option<Arc<str>>,
        actor: Actor,
        now: Duration,
        inside: bool,
    ) {
        debug_assert!(self
            .visits
            .last_key_value()
            .is_none_or(|(last, _)| *last < id));
        self.visits.insert(
            id,
            Visit {
                access,
                step,
                actor,
                since: now,
                inside,
            },
        );
    }

    pub fn get(&self, id: VisitId) -> Option<&Visit> {
        self.visits.get(&id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Visit> {
        self.visits.values()
    }

    pub fn has_queue(&self) -> bool {
        self.visits.values().any(|visit| !visit.inside)
    }

    /// The visits inside that conflict with `thread` entering for `access`.
    pub fn occupants(&self, access: Access, thread: ThreadId) -> impl Iterator<Item = &Visit> {
        let visits = self.visits.values();
        visits.filter(move |visit| visit.inside && visit.is_in_the_way(access, thread))
    }

    /// The conflicting visits that came before the visit `id` and are still in line.
    pub fn ahead(&self, id: VisitId) -> impl Iterator<Item = &Visit> {
        let own = self.visits.get(&id);
        self.visits
            .range(..id)
            .map(|(_, visit)| visit)
            .filter(move |visit| {
                own.is_some_and(|own| {
                    !visit.inside && visit.is_in_the_way(own.access, own.actor.thread)
                })
            })
    }

    /// The visits of `thread` that are in line.
    pub fn queued(&self, thread: ThreadId) -> impl Iterator<Item = (VisitId, &Visit)> {
        self.visits
            .iter()
            .filter(move |(_, visit)| !visit.inside && visit.actor.thread == thread)
            .map(|(id, visit)| (*id, visit))
    }

    pub fn enter(&mut self, id: VisitId, now: Duration) {
        if let Some(visit) = self.visits.get_mut(&id) {
            visit.inside = true;
            visit.since = now;
        }
    }

    pub fn leave(&mut self, id: VisitId) -> Option<Visit> {
        self.visits.remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_parsed_from_its_name_and_nothing_else_is() {
        for phase in Phase::ALL {
            let text = phase.to_string();
            assert_eq!(text.strip_prefix("phase:").unwrap().parse(), Ok(phase));
        }
        for text in ["", "phase:load", "Load", "lobby"] {
            assert!(text.parse::<Phase>().unwrap_err().contains("known: "));
        }
    }

    #[test]
    fn conflicts_are_symmetric_and_a_capture_is_alone() {
        for one in Phase::ALL {
            for other in Phase::ALL {
                assert_eq!(one.conflicts_with(other), other.conflicts_with(one));
            }
            assert!(one.conflicts_with(Phase::Capture));
        }
        assert!(!Phase::Load.conflicts_with(Phase::Forward));
        assert!(!Phase::Forward.conflicts_with(Phase::Forward));
    }

    fn access(phase: Phase, runner: u64, target: Option<u64>) -> Access {
        Access {
            phase,
            runner: Some(RunnerId(runner)),
            target: target.map(RunnerId),
        }
    }

    #[test]
    fn a_load_excludes_phases_of_its_runner_and_of_its_drafts_and_no_others() {
        let load = access(Phase::Load, 1, None);
        let forward = |runner, target| access(Phase::Forward, runner, target);
        for (other, apart) in [
            (forward(1, None), true),
            (access(Phase::Load, 1, None), true),
            (forward(2, Some(1)), true),
            (access(Phase::Load, 2, Some(1)), true),
            (forward(2, None), false),
            (access(Phase::Load, 2, None), false),
            (Phase::Forward.into(), false),
            (Phase::Load.into(), false),
        ] {
            assert_eq!(load.conflicts_with(&other), apart, "{other:?}");
            assert_eq!(other.conflicts_with(&load), apart, "{other:?}");
        }
        // Loading a draft reads its target.
        let draft = access(Phase::Load, 2, Some(1));
        assert!(!draft.conflicts_with(&forward(1, None)));
        assert!(draft.conflicts_with(&forward(2, Some(1))));
        assert!(!forward(1, None).conflicts_with(&forward(1, None)));
    }
}
