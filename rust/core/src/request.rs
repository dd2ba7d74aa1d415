//! A caller's request for a key, and the next action that the registry tells it to take.
//! Plain data; the rules are in `rules`.

use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::policy::Policy;
use crate::slot::Ticket;
use crate::spec::Spec;

/// What the caller sees in the real process, as opposed to the registry's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// The caller did not look: the registry's record is trusted.
    Unknown,
    /// There is no such object.
    Absent,
    /// There is one; the number identifies it.
    Present(u64),
}

/// One caller's request to have `key` initialised as `spec`.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The requested key.
    pub key: Key,
    /// The requested values.
    pub spec: Spec,
    /// What the caller allows.
    pub policy: Policy,
    /// The caller.
    pub actor: Actor,
    /// What the caller sees. It must look again before every `try_acquire`.
    pub observed: Observed,
    /// How long the caller has waited so far; zero until it was first told to wait.
    pub waited: Duration,
    /// How long a leader may take before it is recorded as slow, once per lead.
    pub slow_after: Duration,
}

/// What a caller must do next.
#[derive(Debug, PartialEq)]
#[must_use]
pub enum Step {
    /// Initialise, then publish, fail or poison.
    Lead(Ticket),
    /// Take over state that other code made: publish its real spec as adopted, or fail or poison.
    Adopt(Ticket),
    /// Use the existing state.
    Join {
        /// Its generation; `Registry::lease_at` takes it.
        generation: u64,
    },
    /// Continue: this thread already leads the key.
    Nested,
    /// Call `Registry::wait`, then look again and ask again.
    Wait {
        /// The actor that initialises it or tears it down.
        leader: Actor,
        /// Since when, on the registry's clock.
        since: Duration,
        /// The epoch to pass to `wait`.
        epoch: u64,
    },
}
