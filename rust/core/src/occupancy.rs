//! Places in which only one thread is at a time: a runner's forward, and the steps that compute
//! over one scope's communicators. A second thread does not wait: its error is the actor inside.
//!
//! Lock order: a leaf; no foreign code runs under it.

use crate::actor::Actor;
use crate::phases::RunnerId;
use crate::scopes::ScopeId;
use crate::sync::{lock, Mutex};

/// A place that one thread occupies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// One runner: its attention metadata and static buffers.
    Runner(RunnerId),
    /// The communicators that all runners of a scope use.
    Communicators(ScopeId),
}

/// A thread in a place.
#[derive(Debug)]
struct Occupant {
    place: Place,
    actor: Actor,
    /// How often it has entered and not left.
    depth: usize,
}

/// All occupied places.
#[derive(Debug, Default)]
pub struct Occupancy {
    /// One for each occupied place: as many as threads compute now, so a list.
    inside: Mutex<Vec<Occupant>>,
}

impl Occupancy {
    /// An occupancy without occupied places.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters `place`: the thread of `actor` is inside until it has left as often as it entered.
    /// Returns how often it has entered.
    ///
    /// # Errors
    /// The actor inside, if that is another thread.
    pub fn enter(&self, place: Place, actor: &Actor) -> Result<usize, Actor> {
        let mut inside = lock(&self.inside);
        let Some(it) = inside.iter_mut().find(|it| it.place == place) else {
            inside.push(Occupant {
                place,
                actor: actor.clone(),
                depth: 1,
            });
            return Ok(1);
        };
        if it.actor.thread != actor.thread {
            return Err(it.actor.clone());
        }
        it.depth += 1;
        Ok(it.depth)
    }

    /// Undoes one `enter`.
    pub fn leave(&self, place: Place) {
        let mut inside = lock(&self.inside);
        if let Some(index) = inside.iter().position(|it| it.place == place) {
            inside[index].depth -= 1;
            if inside[index].depth == 0 {
                inside.swap_remove(index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::ThreadId;
    use crate::scopes::DEFAULT;

    fn actor(thread: u64) -> Actor {
        Actor {
            thread: ThreadId(thread),
            thread_name: format!("t{thread}").into(),
            runner: None,
        }
    }

    #[test]
    fn a_second_thread_gets_the_actor_inside_until_that_one_has_left_as_often_as_it_entered() {
        let occupancy = Occupancy::new();
        let place = Place::Runner(RunnerId(1));
        assert_eq!(occupancy.enter(place, &actor(1)), Ok(1));
        assert_eq!(occupancy.enter(place, &actor(1)), Ok(2));
        occupancy.leave(place);
        assert_eq!(occupancy.enter(place, &actor(2)), Err(actor(1)));
        occupancy.leave(place);
        assert_eq!(occupancy.enter(place, &actor(2)), Ok(1));
        assert_eq!(occupancy.enter(place, &actor(1)), Err(actor(2)));
    }

    #[test]
    fn places_are_told_apart() {
        let occupancy = Occupancy::new();
        let places = [
            Place::Runner(RunnerId(0)),
            Place::Runner(RunnerId(1)),
            Place::Communicators(DEFAULT),
            Place::Communicators(ScopeId(1)),
        ];
        for (thread, place) in (1..).zip(places) {
            assert_eq!(occupancy.enter(place, &actor(thread)), Ok(1));
        }
    }

    #[test]
    fn leaving_a_place_that_is_not_occupied_changes_nothing() {
        let occupancy = Occupancy::new();
        occupancy.leave(Place::Runner(RunnerId(1)));
        assert_eq!(
            occupancy.enter(Place::Runner(RunnerId(1)), &actor(1)),
            Ok(1)
        );
    }
}
