//! What a caller asks of a key, and the one next step it is told to take.
//! Plain data; the rules are in `rules`.

use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::policy::Policy;
use crate::slot::Ticket;
use crate::spec::Spec;

/// What the caller sees in the real process, as opposed to what the registry remembers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// The caller did not look: the registry's memory is trusted.
    Unknown,
    /// There is no such object.
    Absent,
    /// There is one; this tells it from others.
    Present(u64),
}

/// One caller's wish to have `key` initialised as `spec`.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What for.
    pub key: Key,
    /// With which values.
    pub spec: Spec,
    /// What the caller allows.
    pub policy: Policy,
    /// Who asks.
    pub actor: Actor,
    /// What is really there. To be looked at anew before every `try_acquire`.
    pub observed: Observed,
    /// How long the caller has waited so far; zero until it was first told to wait.
    pub waited: Duration,
    /// How long a leader may take before it is recorded as slow, once per lead.
    pub slow_after: Duration,
}

/// What a caller is to do.
#[derive(Debug, PartialEq)]
#[must_use]
pub enum Step {
    /// Initialise, then publish, fail or poison.
    Lead(Ticket),
    /// Take over what somebody else made: publish its real spec as adopted, or fail or poison.
    Adopt(Ticket),
    /// Use what exists.
    Join {
        /// Its generation; `Registry::lease_at` takes it.
        generation: u64,
    },
    /// Go on: this thread leads the key already.
    Nested,
    /// `Registry::wait`, then look again and ask again.
    Wait {
        /// Who initialises it or tears it down.
        leader: Actor,
        /// Since when, on the registry's clock.
        since: Duration,
        /// What `wait` compares with.
        epoch: u64,
    },
}
