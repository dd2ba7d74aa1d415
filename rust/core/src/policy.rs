//! What a caller allows, and what was decided about it.

/// What a caller allows. The default allows nothing, as without the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// May join state that another actor built.
    pub reuse: bool,
    /// May pass through to the wrapped function while its own thread leads the key.
    pub reentrant: bool,
}

/// A decision about a key or a phase, as events record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The actor builds the state.
    Lead,
    /// The actor takes over state that other code built.
    Adopt,
    /// The actor uses the existing state.
    Join,
    /// The actor waits for the leader; recorded once, when the wait begins.
    Wait,
    /// The leader takes longer than the waiter's `slow_after`; recorded once per lead.
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
    /// The leader failed and left everything as it was before.
    Fail,
    /// The leader failed and left incomplete state behind.
    Poison,
    /// The state was changed or destroyed outside the registry.
    OutOfBand,
    /// A holder began to use the state.
    Lease,
    /// A holder stopped using the state.
    Release,
    /// The actor began to tear the state down.
    Teardown,
    /// The state is gone.
    TornDown,
    /// State without holders was forgotten, to be made anew.
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
