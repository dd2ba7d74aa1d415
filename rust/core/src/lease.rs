//! Leases on state that is ready. A lease lives inside the Ready state it was taken on and ends
//! with it, so a lease on an earlier generation never releases anything of a later one.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::actor::Actor;

/// Identifies one lease. A registry never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// The holder of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The holder's name, usually the runner's.
    pub name: String,
    /// The actor that took the lease.
    pub actor: Actor,
    /// When it was taken, on the registry's clock.
    pub since: Duration,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' (thread {})", self.name, self.actor.thread_name)
    }
}

/// How a lease ended without being released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    pub by: Actor,
    /// In words: what that actor did to the state.
    pub how: String,
}

/// The leases of one generation of one slot.
pub(crate) type Leases = BTreeMap<LeaseId, Holder>;
