//! The room lock: phases of runners that may overlap share a room, phases that may not wait.
//! Pure: who is inside, who is next. The registry's one lock covers it, and its waits are there.
//!
//! ```text
//! from      by         to
//! -         arrive     Queued, last in line
//! Queued    enter      Inside, when nothing in its way conflicts
//! Queued    leave      -   (gave up: deadline, interrupt, deadlock)
//! Inside    leave      -
//! ```
//!
//! Invariants:
//! - Two threads are never Inside with phases that conflict. A thread does not conflict with itself:
//!   a capture runs forwards.
//! - First come, first served among phases that conflict: whoever arrives later does not overtake,
//!   unless the earlier one waits, through whatever chain, for the later one. Then being polite would
//!   be a deadlock. So the line alone never makes one, and only those Inside count as in the way.
//!
//! Lock order: none here; see `slot`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::actor::{Actor, ThreadId};

/// A phase of a runner that others may have to keep out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Room {
    /// A model's weights are loaded or its memory is allocated.
    Load,
    /// A model computes.
    Forward,
    /// A graph is captured: nothing else may allocate or launch meanwhile.
    Capture,
}

impl Room {
    /// Every room there is.
    pub const ALL: [Self; 3] = [Self::Load, Self::Forward, Self::Capture];

    /// The one table of what excludes what, between threads. Symmetric.
    pub fn conflicts_with(self, other: Self) -> bool {
        match (self, other) {
            (Self::Capture, _) | (_, Self::Capture) => true,
            (Self::Load | Self::Forward, Self::Load | Self::Forward) => false,
        }
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Load => "room:load",
            Self::Forward => "room:forward",
            Self::Capture => "room:capture",
        })
    }
}

impl FromStr for Room {
    type Err = String;

    /// The name without "room:".
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "load" => Ok(Self::Load),
            "forward" => Ok(Self::Forward),
            "capture" => Ok(Self::Capture),
            _ => Err(format!(
                "unknown room {text:?}; known: load, forward, capture"
            )),
        }
    }
}

/// Names one visit of one thread to one room. No number is given out twice by a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VisitId(pub u64);

/// One thread in a room or in line for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Visit {
    /// Which room.
    pub room: Room,
    /// Who.
    pub actor: Actor,
    /// Since when it is inside, or in line.
    pub since: Duration,
    /// Whether it is inside.
    pub inside: bool,
}

/// Every visit, in the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct Rooms {
    visits: BTreeMap<VisitId, Visit>,
}

impl Rooms {
    /// `id` is higher than every earlier one.
    pub fn arrive(&mut self, id: VisitId, room: Room, actor: Actor, now: Duration) {
        debug_assert!(self
            .visits
            .last_key_value()
            .is_none_or(|(last, _)| *last < id));
        self.visits.insert(
            id,
            Visit {
                room,
                actor,
                since: now,
                inside: false,
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

    /// Who is inside and in the way of `thread` entering `room`.
    pub fn occupants(&self, room: Room, thread: ThreadId) -> impl Iterator<Item = &Visit> {
        self.visits.values().filter(move |visit| {
            visit.inside && visit.actor.thread != thread && visit.room.conflicts_with(room)
        })
    }

    /// Who came before the visit `id`, is still in line and conflicts with it.
    pub fn ahead(&self, id: VisitId) -> impl Iterator<Item = &Visit> {
        let own = self.visits.get(&id);
        self.visits
            .range(..id)
            .map(|(_, visit)| visit)
            .filter(move |visit| {
                own.is_some_and(|own| {
                    !visit.inside
                        && visit.actor.thread != own.actor.thread
                        && visit.room.conflicts_with(own.room)
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
    fn every_room_is_parsed_from_its_name_and_nothing_else_is() {
        for room in Room::ALL {
            let text = room.to_string();
            assert_eq!(text.strip_prefix("room:").unwrap().parse(), Ok(room));
        }
        for text in ["", "room:load", "Load", "lobby"] {
            assert!(text.parse::<Room>().unwrap_err().contains("known: "));
        }
    }

    #[test]
    fn conflicts_are_symmetric_and_a_capture_is_alone() {
        for one in Room::ALL {
            for other in Room::ALL {
                assert_eq!(one.conflicts_with(other), other.conflicts_with(one));
            }
            assert!(one.conflicts_with(Room::Capture));
        }
        assert!(!Room::Load.conflicts_with(Room::Forward));
        assert!(!Room::Forward.conflicts_with(Room::Forward));
    }
}
