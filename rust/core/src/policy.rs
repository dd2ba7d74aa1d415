//! What a caller allows, and what was decided.

/// What a caller allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Equal state that exists may be joined.
    pub reuse: bool,
    /// The initialiser itself may ask for the key it is initialising.
    pub reentrant: bool,
}

/// What became of a request or of the state, as events record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The caller initialises.
    Lead,
    /// The caller takes over what somebody else made.
    Adopt,
    /// The caller uses what exists.
    Join,
    /// The leader asked again from within its own initialisation.
    Nested,
    /// The caller waits for the leader.
    Wait,
    /// The caller was refused.
    Refuse,
    /// The caller's deadline passed.
    Timeout,
    /// A leader finished.
    Publish,
    /// A leader failed and undid what it had made.
    Fail,
    /// A leader failed and could not undo what it had made.
    Poison,
    /// The state changed or went away without the registry.
    OutOfBand,
    /// The state was torn down.
    Teardown,
    /// Everything was forgotten.
    Reset,
}

impl Decision {
    /// One word for messages, logs and snapshots.
    pub fn word(self) -> &'static str {
        match self {
            Self::Lead => "lead",
            Self::Adopt => "adopt",
            Self::Join => "join",
            Self::Nested => "nested",
            Self::Wait => "wait",
            Self::Refuse => "refuse",
            Self::Timeout => "timeout",
            Self::Publish => "publish",
            Self::Fail => "fail",
            Self::Poison => "poison",
            Self::OutOfBand => "out-of-band",
            Self::Teardown => "teardown",
            Self::Reset => "reset",
        }
    }
}
