//! A place in which only one thread is at a time: a runner's forward, or the steps that compute over
//! one scope's communicators. A second thread does not wait: its error is the actor inside.
//!
//! Pure: the owner of a place locks it. No foreign code runs under that lock.

use crate::actor::Actor;

/// A thread in a place.
#[derive(Debug)]
struct Occupant {
    actor: Actor,
    /// How often it has entered and not left; never 0.
    depth: usize,
}

/// Which thread is in one place.
#[derive(Debug, Default)]
pub struct Occupancy {
    inside: Option<Occupant>,
}

impl Occupancy {
    /// A place without a thread in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Enters: the thread of `actor` is inside until it has left as often as it entered.
    /// Returns how often it has entered.
    ///
    /// # Errors
    /// The actor inside, if that is another thread.
    pub fn enter(&mut self, actor: &Actor) -> Result<usize, Actor> {
        match &mut self.inside {
            None => {
                self.inside = Some(Occupant {
                    actor: actor.clone(),
                    depth: 1,
                });
                Ok(1)
            }
            Some(it) if it.actor.thread == actor.thread => {
                it.depth += 1;
                Ok(it.depth)
            }
            Some(it) => Err(it.actor.clone()),
        }
    }

    /// Undoes one `enter`. Returns whether the place is empty now.
    pub fn leave(&mut self) -> bool {
        if let Some(it) = &mut self.inside {
            it.depth -= 1;
            if it.depth == 0 {
                self.inside = None;
            }
        }
        self.inside.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::ThreadId;

    fn actor(thread: u64) -> Actor {
        Actor {
            thread: ThreadId(thread),
            thread_name: format!("t{thread}").into(),
            runner: None,
        }
    }

    #[test]
    fn a_second_thread_gets_the_actor_inside_until_that_one_has_left_as_often_as_it_entered() {
        let mut place = Occupancy::new();
        assert_eq!(place.enter(&actor(1)), Ok(1));
        assert_eq!(place.enter(&actor(1)), Ok(2));
        assert!(!place.leave());
        assert_eq!(place.enter(&actor(2)), Err(actor(1)));
        assert!(place.leave());
        assert_eq!(place.enter(&actor(2)), Ok(1));
        assert_eq!(place.enter(&actor(1)), Err(actor(2)));
    }

    #[test]
    fn leaving_a_place_that_is_not_occupied_changes_nothing() {
        let mut place = Occupancy::new();
        assert!(place.leave());
        assert_eq!(place.enter(&actor(1)), Ok(1));
    }
}
