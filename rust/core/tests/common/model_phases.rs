//! The phases of the sequential model. Must share no logic with the crate.

use std::collections::BTreeSet;

use distguard_core::phases::{Access, Phase, VisitId};

use crate::model::{Model, Outcome, Visit};

/// Captures exclude every other visit. A load of runner n excludes every visit that names n.
fn apart(one: Access, other: Access) -> bool {
    for (a, b) in [(one, other), (other, one)] {
        if a.phase == Phase::Capture {
            return true;
        }
        if let (Phase::Load, Some(changed)) = (a.phase, a.runner) {
            if [b.runner, b.target]
                .into_iter()
                .flatten()
                .any(|it| it == changed)
            {
                return true;
            }
        }
    }
    false
}

impl Model {
    /// The threads inside that keep `thread` out, once per visit.
    fn keep_out(&self, access: Access, thread: u64) -> Vec<u64> {
        let inside = self.visits.iter().filter(|it| it.inside);
        inside
            .filter(|it| it.thread != thread && apart(it.access, access))
            .map(|it| it.thread)
            .collect()
    }

    /// The threads that came before the visit and are still in line where it wants to go.
    fn first_in_line(&self, visit: &Visit) -> Vec<u64> {
        let before = self.visits.iter().take_while(|it| it.id != visit.id);
        before
            .filter(|it| !it.inside && it.thread != visit.thread && apart(it.access, visit.access))
            .map(|it| it.thread)
            .collect()
    }

    /// The threads that `thread` waits for directly, in phases.
    fn waited_for(&self, thread: u64, line_too: bool) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        for visit in self
            .visits
            .iter()
            .filter(|it| !it.inside && it.thread == thread)
        {
            found.extend(self.keep_out(visit.access, thread));
            if line_too {
                found.extend(self.first_in_line(visit));
            }
        }
        found
    }

    /// Whether `from` waits for `to`, through any number of threads.
    fn reaches(&self, from: u64, to: u64, line_too: bool) -> bool {
        let mut found = self.waited_for(from, line_too);
        loop {
            let next = found.iter().flat_map(|it| self.waited_for(*it, line_too));
            let more: BTreeSet<u64> = found.iter().copied().chain(next).collect();
            if more == found {
                return found.contains(&to);
            }
            found = more;
        }
    }

    /// Whether `thread` cannot go on before `asker` does. In the model no thread sleeps for a key.
    pub fn is_stuck_behind(&self, thread: u64, asker: u64) -> bool {
        thread == asker || self.reaches(thread, asker, false)
    }

    pub fn arrive(&mut self, id: VisitId, access: Access, thread: u64) -> Outcome {
        self.visits.push(Visit {
            id,
            thread,
            access,
            inside: false,
        });
        self.try_enter(id)
    }

    pub fn try_enter(&mut self, id: VisitId) -> Outcome {
        let Some(index) = self.visits.iter().position(|it| it.id == id) else {
            return Outcome::VisitOver;
        };
        let visit = self.visits[index].clone();
        if visit.inside {
            return Outcome::Inside;
        }
        let in_the_way = self.keep_out(visit.access, visit.thread);
        if in_the_way
            .iter()
            .any(|it| self.is_stuck_behind(*it, visit.thread))
        {
            self.visits.remove(index);
            return Outcome::Deadlock;
        }
        let line = self.first_in_line(&visit);
        let polite = line.iter().any(|it| !self.reaches(*it, visit.thread, true));
        if in_the_way.is_empty() && !polite {
            self.visits[index].inside = true;
            return Outcome::Inside;
        }
        Outcome::InLine(in_the_way)
    }

    pub fn leave(&mut self, id: VisitId) -> Outcome {
        let before = self.visits.len();
        self.visits.retain(|it| it.id != id);
        if self.visits.len() < before {
            Outcome::Yes
        } else {
            Outcome::No
        }
    }

    pub fn time_out(&mut self, id: VisitId) -> Outcome {
        let Some(visit) = self.visits.iter().find(|it| it.id == id).cloned() else {
            return Outcome::VisitOver;
        };
        let in_the_way = self.keep_out(visit.access, visit.thread);
        let _ = self.leave(id);
        Outcome::GaveUp(in_the_way)
    }
}
