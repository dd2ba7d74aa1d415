//! Why a request was refused, in sentences that name the values, the holders and the remedy.
//! Plain facts beside the sentences, so that programs need not parse them.

use std::fmt;
use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::lease::Holder;
use crate::phases::Access;
use crate::slot::Purpose;
use crate::spec::FieldDiff;
use crate::waitgraph::Edge;

/// Who has the state that a request ran into.
#[derive(Debug, Clone, PartialEq)]
pub struct Owner {
    /// Who made it, or is at it.
    pub leader: Actor,
    /// What the leader is doing; None when the state is there.
    pub purpose: Option<Purpose>,
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
        /// Where the request differs; never empty.
        diff: Vec<FieldDiff>,
        /// Who has it.
        owner: Owner,
    },
    /// Equal state exists, or is being made, and the request does not allow to reuse it.
    ReuseForbidden {
        /// What was asked for.
        key: Key,
        /// Who has it.
        owner: Owner,
    },
    /// The deadline passed while another thread was at it.
    Timeout {
        /// What was asked for.
        key: Key,
        /// Who is at it; None when it came free at the last moment.
        owner: Option<Owner>,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The deadline passed in line for a phase.
    PhaseTimeout {
        /// Which phase, for whom.
        access: Access,
        /// Who is inside and in the way; empty when others were first in line.
        inside: Vec<Actor>,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The visit to a phase has ended, or was made before a fork.
    VisitOver,
    /// The state is there, but belongs to the process that this one was forked from.
    Inherited {
        /// What was asked for.
        key: Key,
    },
    /// The state that a lease was on is gone, or going, although it was held.
    LeaseBroken {
        /// What was held.
        key: Key,
        /// Who did it; None when the holder itself gave the lease back.
        by: Option<Actor>,
        /// What that was.
        how: String,
    },
    /// A leader failed and could not undo what it had done.
    Poisoned {
        /// What was asked for.
        key: Key,
        /// What went wrong.
        reason: String,
        /// Who was at it.
        by: Actor,
    },
    /// Waiting would never end.
    Deadlock {
        /// Each thread and what it waits for, the caller first; what the last one waits for, the
        /// caller has. Never empty.
        cycle: Vec<Edge>,
    },
    /// The state is held.
    InUse {
        /// What was to be torn down.
        key: Key,
        /// Who holds it; never empty.
        holders: Vec<Holder>,
    },
    /// Another thread is making the state or tearing it down.
    Busy {
        /// What was to be torn down or reset.
        key: Key,
        /// Who is at it.
        leader: Actor,
    },
    /// There is nothing to lease, or not what the caller joined.
    NotReady {
        /// What was to be leased.
        key: Key,
    },
    /// The ticket leads no more: it was used, or issued before a fork.
    StaleTicket {
        /// What it led.
        key: Key,
    },
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SpecMismatch { key, diff, owner } => write!(
                f,
                "{key} was requested with other values than it has: {}. It is {owner}. \
                 Request the existing values, or {}use another process.",
                join(diff, "; "),
                match key {
                    Key::Process => String::new(), // what SGLang switches on it never switches off
                    _ => format!(
                        "{}tear the existing {key} down first, or ",
                        close_first(&owner.holders)
                    ),
                },
            ),
            Self::ReuseForbidden { key, owner } => write!(
                f,
                "{key} exists with the requested values, but this caller may not reuse it. It is \
                 {owner}. Allow reuse (SGLANG_ALLOW_REUSE_DISTRIBUTED=true), or {}tear the \
                 existing {key} down first, or use another process.",
                close_first(&owner.holders)
            ),
            Self::Timeout { key, owner, waited } => {
                write!(f, "Gave up after waiting {} for {key}", seconds(*waited))?;
                if let Some(owner) = owner {
                    write!(f, ", which is {owner}")?;
                }
                f.write_str(
                    ". Nothing was changed. Look at what that thread does, or allow more time: \
                     runner_scope(timeout=…), install(timeout=…) or SGLANG_DISTGUARD_TIMEOUT.",
                )
            }
            Self::PhaseTimeout {
                access,
                inside,
                waited,
            } => write!(
                f,
                "Gave up after waiting {} for {access}: {}. Nothing was changed. Look at what that \
                 thread does, or allow more time: runner_scope(timeout=…), install(timeout=…) or \
                 SGLANG_DISTGUARD_TIMEOUT.",
                seconds(*waited),
                if inside.is_empty() {
                    "others were first in line".to_owned()
                } else {
                    format!("{} in the way", join(inside, ", "))
                }
            ),
            Self::VisitOver => f.write_str(
                "This visit to a phase has ended, or was made before a fork. Enter the phase again.",
            ),
            Self::Inherited { key } => write!(
                f,
                "{key} was initialised by the process that this one was forked from, and does not \
                 survive a fork: its threads are gone and its sockets are the parent's. Start \
                 processes that build runners with spawn, or fork before anything is initialised."
            ),
            Self::LeaseBroken { key, by, how } => {
                write!(f, "{key} can no longer be used by its holder: ")?;
                if let Some(by) = by {
                    write!(f, "{by} ")?;
                }
                write!(f, "{how}. Build a new runner; close() this one.")
            }
            Self::Poisoned { key, reason, by } => write!(
                f,
                "{key} is half-made: {by} failed and could not undo what it had done ({reason}). \
                 Call sglang_distguard.reset() once no runner uses it, or restart the process."
            ),
            Self::Deadlock { cycle } => {
                f.write_str("Waiting would never end: ")?;
                for edge in cycle {
                    write!(f, "{} waits for {}, had by ", edge.name, edge.subject)?;
                }
                f.write_str(
                    "the first. An initialiser must not ask again for what it is initialising; \
                     several must ask for what they share in the same order.",
                )
            }
            Self::InUse { key, holders } => write!(
                f,
                "{key} cannot be torn down: it is held by {}. close() those runners first, or \
                 use sglang_distguard.teardown(force=True), which breaks what they hold.",
                join(holders, ", ")
            ),
            Self::Busy { key, leader } => write!(
                f,
                "{key} cannot be torn down or reset: {leader} is initialising it or tearing it \
                 down right now. Wait until that is done."
            ),
            Self::NotReady { key } => write!(
                f,
                "{key} cannot be held: it is not initialised, or was rebuilt since it was joined. \
                 Acquire it first."
            ),
            Self::StaleTicket { key } => write!(
                f,
                "What was made for {key} is not registered: its leader gave up the lead before, \
                 or got it before a fork. Acquire {key} again."
            ),
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (leader, age) = (&self.leader, seconds(self.age));
        match self.purpose {
            None => write!(f, "initialised by {leader} {age} ago")?,
            Some(Purpose::Build) => write!(f, "being initialised by {leader} for {age}")?,
            Some(Purpose::Adopt) => write!(f, "being adopted by {leader} for {age}")?,
            Some(Purpose::Teardown) => write!(f, "being torn down by {leader} for {age}")?,
        }
        if self.holders.is_empty() {
            return Ok(());
        }
        write!(f, ", held by {}", join(&self.holders, ", "))
    }
}

fn close_first(holders: &[Holder]) -> &'static str {
    if holders.is_empty() {
        ""
    } else {
        "close() those runners and "
    }
}

pub(crate) fn join<T: fmt::Display>(items: &[T], separator: &str) -> String {
    let items: Vec<_> = items.iter().map(ToString::to_string).collect();
    items.join(separator)
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::ThreadId;

    fn actor(runner: Option<&str>) -> Actor {
        Actor {
            thread: ThreadId(1),
            thread_name: "T1".into(),
            runner: runner.map(Into::into),
        }
    }

    fn owner(purpose: Option<Purpose>, held: bool) -> Owner {
        let holder = Holder {
            name: "b".into(),
            actor: actor(None),
            since: Duration::ZERO,
        };
        Owner {
            leader: actor(Some("a")),
            purpose,
            age: Duration::from_millis(2500),
            holders: if held { vec![holder] } else { vec![] },
        }
    }

    fn assert_says(error: &Error, parts: &[&str]) {
        let text = error.to_string();
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(text.ends_with('.'), "{text:?} is no sentence");
    }

    #[test]
    fn a_mismatch_names_both_values_the_leader_the_holders_and_the_remedy() {
        let error = Error::SpecMismatch {
            key: Key::World,
            diff: vec![FieldDiff {
                field: "backend".into(),
                existing: Some("nccl".into()),
                requested: Some("gloo".into()),
            }],
            owner: owner(None, true),
        };
        let parts = [
            "world",
            "backend: existing 'nccl', requested 'gloo'",
            "initialised by runner 'a' (thread T1) 2.5 s ago",
            "held by 'b' (thread T1)",
            "close() those runners",
        ];
        assert_says(&error, &parts);
    }

    #[test]
    fn nobody_is_asked_to_close_runners_that_do_not_exist() {
        let error = Error::ReuseForbidden {
            key: Key::Groups(String::new()),
            owner: owner(Some(Purpose::Build), false),
        };
        assert_says(&error, &["being initialised", "for 2.5 s", "Allow reuse"]);
        assert!(!error.to_string().contains("close()"));
    }

    #[test]
    fn a_timeout_names_the_leader_and_what_it_is_doing() {
        let mut owner = owner(Some(Purpose::Adopt), false);
        let error = |owner| Error::Timeout {
            key: Key::World,
            owner,
            waited: Duration::from_secs(7),
        };
        let parts = ["7.0 s", "being adopted by runner 'a' (thread T1) for 2.5 s"];
        assert_says(&error(Some(owner.clone())), &parts);
        owner.purpose = Some(Purpose::Teardown);
        assert_says(&error(Some(owner)), &["being torn down by"]);
        assert_says(&error(None), &["more time"]);
    }

    #[test]
    fn a_deadlock_names_every_thread_of_the_cycle() {
        let edge = |thread, name: &str, subject| Edge {
            thread: ThreadId(thread),
            name: name.into(),
            subject,
        };
        let cycle = vec![
            edge(1, "thread T1", (&Key::World).into()),
            edge(2, "thread T2", (&crate::phases::Phase::Capture).into()),
        ];
        let text = "thread T1 waits for world, had by thread T2 waits for phase:capture, had by \
                    the first.";
        assert_says(&Error::Deadlock { cycle }, &[text]);
    }

    #[test]
    fn the_other_errors_name_the_key_who_and_what_to_do() {
        let (key, by) = (Key::Experts("x".into()), actor(None));
        let reason = "boom".to_string();
        let poisoned = Error::Poisoned {
            key: key.clone(),
            reason,
            by: by.clone(),
        };
        assert_says(&poisoned, &["experts:x", "thread T1", "(boom)", "reset()"]);
        let in_use = Error::InUse {
            key: key.clone(),
            holders: owner(None, true).holders,
        };
        assert_says(&in_use, &["experts:x", "'b' (thread T1)", "force"]);
        let busy = Error::Busy {
            key: key.clone(),
            leader: by,
        };
        assert_says(&busy, &["experts:x", "thread T1", "Wait"]);
        assert_says(&Error::NotReady { key: key.clone() }, &["experts:x"]);
        assert_says(&Error::StaleTicket { key }, &["experts:x", "again"]);
    }
}
