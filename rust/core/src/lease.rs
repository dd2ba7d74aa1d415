//! Who holds a piece of shared state, so that it is not torn down under them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::actor::Actor;

/// Names one lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The runner's name.
    pub name: String,
    /// The thread that took the lease.
    pub actor: Actor,
    /// When, on the registry's clock.
    pub since: Duration,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' (thread {})", self.name, self.actor.thread_name)
    }
}

/// The leases of one generation of one slot.
pub(crate) type Leases = BTreeMap<LeaseId, Holder>;
