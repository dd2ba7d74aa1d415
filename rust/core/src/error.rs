//! The registry's errors. Their messages name the values, the holders and the remedy.
//! The fields hold the same facts as data, so that programs need not parse the messages.

use std::fmt;
use std::time::Duration;

use crate::actor::Actor;
use crate::key::Key;
use crate::lease::Holder;
use crate::phases::Access;
use crate::slot::Purpose;
use crate::spec::FieldDiff;
use crate::waitgraph::{Edge, Subject};

/// The leader and the holders of the requested state.
#[derive(Debug, Clone, PartialEq)]
pub struct Owner {
    /// The actor that made the state, or that is making it or tearing it down.
    pub leader: Actor,
    /// What the leader is doing; None when the state is ready.
    pub purpose: Option<Purpose>,
    /// Time since the leader began, or since the state was published.
    pub age: Duration,
    /// The holders of leases on it.
    pub holders: Vec<Holder>,
}

/// The reason why the registry refused a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Error {
    /// The state exists, or is being made, with other values.
    SpecMismatch {
        /// The requested key.
        key: Key,
        /// The fields that differ; never empty.
        diff: Vec<FieldDiff>,
        /// The leader and the holders of the state.
        owner: Owner,
    },
    /// Equal state exists, or is being made, and the request does not allow reuse.
    ReuseForbidden {
        /// The requested key.
        key: Key,
        /// The leader and the holders of the state.
        owner: Owner,
    },
    /// The deadline passed while another thread led the key.
    Timeout {
        /// The requested key.
        key: Key,
        /// The leader; None when the key became free at the last moment.
        owner: Option<Owner>,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The deadline passed while the thread was in line for a phase.
    PhaseTimeout {
        /// The phase, and the runners for which it was requested.
        access: Access,
        /// The actors inside a conflicting phase; empty when only visits ahead in line blocked it.
        inside: Vec<Actor>,
        /// How long the caller waited.
        waited: Duration,
    },
    /// The visit to a phase has ended, or was made before a fork.
    VisitOver,
    /// The state exists, but belongs to the process that this one was forked from.
    Inherited {
        /// The requested key.
        key: Key,
    },
    /// The state under a lease is gone, or is being torn down, although it was held.
    LeaseBroken {
        /// The key that was held.
        key: Key,
        /// The actor that broke the lease; None when the holder released it itself.
        by: Option<Actor>,
        /// What happened, in words.
        how: String,
    },
    /// A leader failed and could not undo what it had done.
    Poisoned {
        /// The requested key.
        key: Key,
        /// Why the leader failed.
        reason: String,
        /// The leader that failed.
        by: Actor,
    },
    /// The wait would never end.
    Deadlock {
        /// Each thread and the subject it waits for, the caller first. The next thread holds or
        /// blocks that subject, the caller that of the last thread. Never empty.
        cycle: Vec<Edge>,
    },
    /// The state is held.
    InUse {
        /// The key that was to be torn down or reset.
        key: Key,
        /// Its holders; never empty.
        holders: Vec<Holder>,
    },
    /// Another thread is making the state or tearing it down.
    Busy {
        /// The key that was to be torn down or reset.
        key: Key,
        /// The other thread.
        leader: Actor,
    },
    /// The state to lease does not exist, or is not the generation that the caller joined.
    NotReady {
        /// The key that was to be leased.
        key: Key,
    },
    /// The ticket no longer leads its key: it was used, or was issued before a fork.
    StaleTicket {
        /// The key that it led.
        key: Key,
    },
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SpecMismatch { key, diff, owner } => write!(
                f,
                "{key} was requested with values that differ from the existing ones: {}. It \
                 {owner}. Request the existing values, or {}use another process.",
                join(diff, "; "),
                match key {
                    Key::Process => String::new(), // SGLang never switches such a setting off again
                    _ => format!(
                        "{}tear the existing {key} down first, or ",
                        close_first(&owner.holders)
                    ),
                },
            ),
            Self::ReuseForbidden { key, owner } => write!(
                f,
                "{key} exists with the requested values, but this caller may not reuse it. It \
                 {owner}. Allow reuse (SGLANG_ALLOW_REUSE_DISTRIBUTED=true), or {}tear the \
                 existing {key} down first, or use another process.",
                close_first(&owner.holders)
            ),
            Self::Timeout { key, owner, waited } => {
                write!(f, "Timed out after waiting {} for {key}", seconds(*waited))?;
                if let Some(owner) = owner {
                    write!(f, ", which {owner}")?;
                }
                f.write_str(&after_a_timeout(owner.is_some()))
            }
            Self::PhaseTimeout {
                access,
                inside,
                waited,
            } => write!(
                f,
                "Timed out after waiting {} for {access}, because {}{}",
                seconds(*waited),
                obstacle(inside),
                after_a_timeout(!inside.is_empty())
            ),
            Self::VisitOver => f.write_str(
                "This visit to a phase has ended, or was made before a fork. Enter the phase again.",
            ),
            Self::Inherited { key } => write!(
                f,
                "{key} was initialised by the process that this one was forked from, and does not \
                 survive a fork: its threads are gone and its sockets belong to the parent. \
                 Use the spawn start method for processes that build runners, or fork before \
                 anything is initialised."
            ),
            Self::LeaseBroken { key, by, how } => {
                write!(f, "{key} can no longer be used by its holder: ")?;
                if let Some(by) = by {
                    write!(f, "{by} ")?;
                }
                write!(f, "{how}. close() this runner and build a new one.")
            }
            Self::Poisoned { key, reason, by } => write!(
                f,
                "{key} is poisoned (left incomplete): {by} failed and could not undo what it had \
                 done ({reason}). Call sglang_distguard.reset() once no runner uses it, or restart \
                 the process."
            ),
            Self::Deadlock { cycle } => write!(
                f,
                "This wait would never end: {}. An initialiser must not request again what it is \
                 initialising. Initialisers that share several keys must request them in the same \
                 order. A step that is refused because another one waits for it may be called \
                 again.",
                join(&circle(cycle), "; ")
            ),
            Self::InUse { key, holders } => write!(
                f,
                "{key} cannot be torn down or reset: it is held by {}. close() those runners \
                 first, or pass force=True to sglang_distguard.teardown or reset, which breaks \
                 their leases.",
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
                "The new state of {key} was not registered: its leader had already stopped \
                 leading, or began to lead before a fork. Acquire {key} again."
            ),
        }
    }
}

/// Why a thread did not enter its phase in time.
fn obstacle(inside: &[Actor]) -> String {
    if inside.is_empty() {
        return "other threads were ahead in line".into();
    }
    format!("a conflicting phase is occupied by {}", join(inside, ", "))
}

/// What the caller can do after a timeout; `is_named`: the text before names the thread in the way.
fn after_a_timeout(is_named: bool) -> String {
    let first = if is_named {
        "Look at what that thread does"
    } else {
        "Try again"
    };
    format!(
        ". Nothing was changed. {first}, or allow more time: runner_scope(timeout=…), \
         install(timeout=…) or SGLANG_DISTGUARD_TIMEOUT."
    )
}

/// The edges of a cycle as text. The next thread of the circle holds what a thread waits for.
fn circle(cycle: &[Edge]) -> Vec<String> {
    let holders = cycle.iter().cycle().skip(1);
    cycle
        .iter()
        .zip(holders)
        .map(|(edge, holder)| {
            let (name, wanted, holder) = (&edge.name, &edge.subject, &holder.name);
            // A phase is not held: the other thread is in one that conflicts with it.
            let relation = match wanted {
                Subject::Key(_) => "held by",
                Subject::Phase(_) => "blocked by",
            };
            format!("{name} waits for {wanted} ({relation} {holder})")
        })
        .collect()
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (leader, age) = (&self.leader, seconds(self.age));
        match self.purpose {
            None => write!(f, "was initialised by {leader} {age} ago")?,
            Some(Purpose::Build) => write!(f, "is being initialised by {leader} for {age}")?,
            Some(Purpose::Adopt) => write!(f, "is being adopted by {leader} for {age}")?,
            Some(Purpose::Teardown) => write!(f, "is being torn down by {leader} for {age}")?,
        }
        if self.holders.is_empty() {
            return Ok(());
        }
        write!(f, " and is held by {}", join(&self.holders, ", "))
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
        assert!(text.ends_with('.'), "{text:?} is not a sentence");
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
    fn a_message_without_holders_does_not_ask_to_close_runners() {
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
        let text = "thread T1 waits for world (held by thread T2); thread T2 waits for \
                    phase:capture (blocked by thread T1). ";
        assert_says(&Error::Deadlock { cycle }, &[text]);
    }

    #[test]
    fn the_other_errors_name_the_key_the_thread_and_the_remedy() {
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
