//! Why a request was refused, in sentences that name the values, the holder and the remedy.

use std::fmt;
use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::lease::Holder;
use crate::spec::FieldDiff;
use crate::waitgraph::Edge;

/// Who has the state that a request ran into.
#[derive(Debug, Clone, PartialEq)]
pub struct Owner {
    /// Who made it, or is making it.
    pub leader: Actor,
    /// Whether it is still being made.
    pub running: bool,
    /// Since how long.
    pub age: Duration,
    /// Who holds leases on it.
    pub holders: Vec<Holder>,
}

/// Why the registry refused.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// The state exists, or is being made, for other values.
    SpecMismatch {
        /// What was asked for.
        key: Key,
        /// Where the request differs.
        diff: Vec<FieldDiff>,
        /// Who has it.
        owner: Owner,
    },
    /// Equal state exists, and the request does not allow to reuse it.
    ReuseForbidden {
        /// What was asked for.
        key: Key,
        /// Who has it.
        owner: Owner,
    },
    /// The deadline passed while another thread was initialising.
    Timeout {
        /// What was asked for.
        key: Key,
        /// Who is initialising it; None when it came free at the last moment.
        owner: Option<Owner>,
        /// How long the caller waited.
        waited: Duration,
    },
    /// An initialisation failed and could not be undone.
    Poisoned {
        /// What was asked for.
        key: Key,
        /// What went wrong.
        reason: String,
        /// Who was initialising it.
        by: Actor,
    },
    /// Waiting would never end.
    Deadlock {
        /// Each thread and what it waits for; the last waits for the first.
        cycle: Vec<Edge>,
    },
    /// The state is held.
    InUse {
        /// What was to be torn down.
        key: Key,
        /// Who holds it.
        holders: Vec<Holder>,
    },
    /// The state is being initialised or torn down right now.
    Busy {
        /// What was asked for.
        key: Key,
        /// Who is at it.
        leader: Actor,
    },
    /// There is nothing to lease.
    NotReady {
        /// What was asked for.
        key: Key,
    },
    /// The ticket leads no more: the registry was reset, or the ticket was used.
    StaleTicket {
        /// What it led.
        key: Key,
    },
}

fn value(value: Option<&crate::spec::Value>) -> String {
    value.map_or_else(|| "(not set)".to_owned(), ToString::to_string)
}

/// `'a' (thread T1), 'b' (thread T2)`.
pub fn list(holders: &[Holder]) -> String {
    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
    names.join(", ")
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.running {
            "being initialised"
        } else {
            "initialised"
        };
        let age = self.age.as_secs_f64();
        write!(f, "{verb} by {} {age:.1} s ago", self.leader)?;
        if self.holders.is_empty() {
            Ok(())
        } else {
            write!(f, ", held by {}", list(&self.holders))
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SpecMismatch { key, diff, owner } => {
                write!(f, "{key} cannot be reused: ")?;
                for (index, field) in diff.iter().enumerate() {
                    let comma = if index > 0 { "; " } else { "" };
                    let (existing, requested) = (
                        value(field.existing.as_ref()),
                        value(field.requested.as_ref()),
                    );
                    let name = &field.field;
                    write!(f, "{comma}{name} is {existing}, requested {requested}")?;
                }
                write!(
                    f,
                    ". It is {owner}. Request the existing values, or close those runners and \
                     destroy the {key} first, or use another process"
                )
            }
            Self::ReuseForbidden { key, owner } => write!(
                f,
                "{key} exists and this caller may not reuse it (reuse=False). It is {owner}. \
                 Allow reuse, or close those runners and destroy the {key} first"
            ),
            Self::Timeout { key, owner, waited } => {
                write!(f, "waited {:.1} s for {key}", waited.as_secs_f64())?;
                if let Some(owner) = owner {
                    write!(f, ", which is {owner}")?;
                }
                write!(
                    f,
                    ". Nothing was changed. Look at what that thread does, or allow more time: \
                     runner_scope(timeout=…), install(timeout=…) or SGLANG_DISTGUARD_TIMEOUT"
                )
            }
            Self::Poisoned { key, reason, by } => write!(
                f,
                "{key} is half-made: {by} failed to initialise it and could not undo it \
                 ({reason}). Call sglang_distguard.reset() once no runner uses it, or restart \
                 the process"
            ),
            Self::Deadlock { cycle } => {
                f.write_str("waiting would never end: ")?;
                for (index, edge) in cycle.iter().enumerate() {
                    let arrow = if index > 0 {
                        " leads it and waits for "
                    } else {
                        " waits for "
                    };
                    let thread = edge.thread.0;
                    let comma = if index > 0 {
                        ", which thread "
                    } else {
                        "thread "
                    };
                    write!(f, "{comma}{thread}{arrow}{}", edge.key)?;
                }
                f.write_str(
                    ", which the first thread leads. An initialiser must not ask for what it is \
                     initialising, nor two for each other's",
                )
            }
            Self::InUse { key, holders } => write!(
                f,
                "{key} is in use by {}. close() those runners first, or force it",
                list(holders)
            ),
            Self::Busy { key, leader } => write!(
                f,
                "{key} is being initialised or torn down by {leader}. Wait for it to finish"
            ),
            Self::NotReady { key } => write!(f, "{key} is not initialised"),
            Self::StaleTicket { key } => write!(
                f,
                "{key} was reset while it was being initialised; what was made is not registered"
            ),
        }
    }
}

impl std::error::Error for Error {}
