//! What a caller allows, and what was decided about it.

/// What a caller allows. The default allows nothing, as without the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// May join state that another actor built.
    pub reuse: bool,
    /// May pass through to the wrapped function while its own thread leads the key.
    pub reentrant: bool,
}

/// What happened to a key, as events record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The actor builds the state.
    Lead,
    /// The actor takes over state that somebody else built.
    Adopt,
    /// The actor uses the state that is there.
    Join,
    /// The actor waits for the leader; recorded once, when the wait begins.
    Wait,
    /// The leader is slower than the waiter finds normal; recorded once per lead.
    Slow,
    /// The actor called again from inside its own lead.
    Nested,
    /// The actor was refused: other values, no reuse, in use, busy, poisoned or not ready.
    Refuse,
    /// Waiting would have closed a cycle.
    Deadlock,
    /// The deadline passed while another actor led.
    Timeout,
    /// The leader made the state ready.
    Publish,
    /// The leader gave up and left nothing behind.
    Fail,
    /// The leader gave up and left something half-built behind.
    Poison,
    /// The state was changed or destroyed behind the registry's back.
    OutOfBand,
    /// A holder began to use the state.
    Lease,
    /// A holder stopped using the state.
    Release,
    /// The actor began to tear the state down.
    Teardown,
    /// The state is gone.
    TornDown,
    /// State that nobody holds was given up, to be made anew.
    Forget,
    /// The key was reset.
    Reset,
}

impl Decision {
    /// The word used in snapshots, logs, traces and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Lead => "lead",
            Self::Adopt => "adopt",
            Self::Join => "join",
            Self::Wait => "wait",
            Self::Slow => "slow",
            Self::Nested => "nested",
            Self::Refuse => "refuse",
            Self::Deadlock => "deadlock",
            Self::Timeout => "timeout",
            Self::Publish => "publish",
            Self::Fail => "fail",
            Self::Poison => "poison",
            Self::OutOfBand => "out-of-band",
            Self::Lease => "lease",
            Self::Release => "release",
            Self::Teardown => "teardown",
            Self::TornDown => "torn-down",
            Self::Forget => "forget",
            Self::Reset => "reset",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_policy_allows_nothing() {
        let policy = Policy::default();
        assert!(!policy.reuse && !policy.reentrant);
    }
}
