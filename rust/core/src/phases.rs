//! The phase lock: phases of runners that may overlap share a phase, phases that may not wait.
//! Captures are alone in the process; what loads a runner is alone with that runner.
//! Pure: who is inside, who is next. The registry's one lock covers it, and its waits are there.
//!
//! ```text
//! from      by         to
//! -         arrive     Queued, last in line
//! -         arrive     Inside, when nothing that conflicts is inside or in line
//! Queued    enter      Inside, when nothing in its way conflicts
//! Queued    leave      -   (gave up: deadline, interrupt, deadlock)
//! Inside    leave      -
//! ```
//!
//! Invariants:
//! - Two threads are never Inside for accesses that conflict. A thread does not conflict with itself:
//!   a capture runs forwards.
//! - First come, first served among phases that conflict: whoever arrives later does not overtake,
//!   unless the earlier one waits, through whatever chain, for the later one. Then being polite would
//!   be a deadlock. So the line alone never makes one, and only those Inside count as in the way.
//!
//! Lock order: none here; see `slot`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};

/// A phase of a runner that others may have to keep out of.
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
    /// Every phase there is.
    pub const ALL: [Self; 3] = [Self::Load, Self::Forward, Self::Capture];

    /// What excludes what whichever runners are concerned; the rest is `Access::conflicts_with`.
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

/// Names a runner. No number is given out twice in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunnerId(pub u64);

/// What a visit is for: a phase, and the runners that it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access {
    /// The phase.
    pub phase: Phase,
    /// Whose phase. A load changes that runner, any other phase reads it.
    pub runner: Option<RunnerId>,
    /// The runner whose weights `runner`, its draft, uses: read in every phase.
    pub target: Option<RunnerId>,
}

impl Access {
    /// The one table of what excludes what, between threads. Symmetric.
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

/// Names one visit of one thread to one phase. No number is given out twice by a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VisitId(pub u64);

/// One thread in a phase or in line for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Visit {
    /// What for.
    pub access: Access,
    /// The runner's method, if it is one.
    pub step: Option<Arc<str>>,
    /// Who.
    pub actor: Actor,
    /// Since when it is inside, or in line.
    pub since: Duration,
    /// Whether it is inside.
    pub inside: bool,
}

impl Visit {
    /// Whether `thread` cannot be inside for `access` together with it.
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
    /// Whether `thread` may enter for `access` without lining up: nobody who conflicts with it is
    /// inside, or came before and is still in line.
    pub fn is_free(&self, access: Access, thread: ThreadId) -> bool {
        let mut visits = self.visits.values();
        !visits.any(|visit| visit.is_in_the_way(access, thread))
    }

    /// `id` is higher than every earlier one. At once `inside` only where it `is_free`.
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

    pub fn is_anybody_queued(&self) -> bool {
        self.visits.values().any(|visit| !visit.inside)
    }

    /// Who is inside and in the way of `thread` entering for `access`.
    pub fn occupants(&self, access: Access, thread: ThreadId) -> impl Iterator<Item = &Visit> {
        let visits = self.visits.values();
        visits.filter(move |visit| visit.inside && visit.is_in_the_way(access, thread))
    }

    /// Who came before the visit `id`, is still in line and conflicts with it.
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

    /// The visits that `thread` is in line for.
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
    fn a_load_keeps_out_of_its_runner_and_of_drafts_of_it_and_of_nothing_else() {
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
