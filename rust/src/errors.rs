//! The one table from registry errors to the exception classes of `sglang_distguard.errors`.

use distguard_core::error::{Error, Owner};
use distguard_core::lease::Holder;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::convert::value_to_python;

/// Makes `sglang_distguard.errors.<class>(message, **details)`.
pub fn make(
    py: Python<'_>,
    class: &str,
    message: &str,
    details: &Bound<'_, PyDict>,
) -> PyResult<PyErr> {
    let class = py.import("sglang_distguard.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((message,), Some(details))?))
}

pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failed| failed)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let details = PyDict::new(py);
    let class = match error {
        Error::SpecMismatch { key, diff, owner } => {
            let fields = PyDict::new(py);
            for field in diff {
                let both = PyDict::new(py);
                let existing = field.existing.as_ref();
                let requested = field.requested.as_ref();
                both.set_item(
                    "existing",
                    existing.map(|v| value_to_python(py, v)).transpose()?,
                )?;
                both.set_item(
                    "requested",
                    requested.map(|v| value_to_python(py, v)).transpose()?,
                )?;
                fields.set_item(&field.field, both)?;
            }
            details.set_item("key", key.to_string())?;
            details.set_item("fields", fields)?;
            add_owner(&details, owner)?;
            "SpecMismatch"
        }
        Error::ReuseForbidden { key, owner } => {
            details.set_item("key", key.to_string())?;
            add_owner(&details, owner)?;
            "StateInUse"
        }
        Error::Timeout { key, owner, waited } => {
            details.set_item("key", key.to_string())?;
            details.set_item("waited", waited.as_secs_f64())?;
            if let Some(owner) = owner {
                add_owner(&details, owner)?;
            }
            "AcquireTimeout"
        }
        Error::PhaseTimeout {
            access,
            inside,
            waited,
        } => {
            details.set_item("key", access.to_string())?;
            details.set_item("waited", waited.as_secs_f64())?;
            let names: Vec<_> = inside.iter().map(ToString::to_string).collect();
            details.set_item("holders", names)?;
            if let Some(first) = inside.first() {
                details.set_item("leader_thread", first.thread.0)?;
            }
            "AcquireTimeout"
        }
        Error::Inherited { key } => {
            details.set_item("key", key.to_string())?;
            "ForkedError"
        }
        Error::LeaseBroken { key, by, how } => {
            details.set_item("key", key.to_string())?;
            details.set_item("by", by.as_ref().map(ToString::to_string))?;
            details.set_item("how", how)?;
            "LeaseBroken"
        }
        Error::VisitOver => "DistGuardError",
        Error::Poisoned { key, reason, by } => {
            details.set_item("key", key.to_string())?;
            details.set_item("reason", reason)?;
            details.set_item("leader", by.to_string())?;
            "PoisonedState"
        }
        Error::Deadlock { cycle } => {
            let edges = cycle
                .iter()
                .map(|edge| (edge.thread.0, edge.subject.to_string()));
            details.set_item("cycle", PyList::new(py, edges.collect::<Vec<_>>())?)?;
            "DeadlockError"
        }
        Error::InUse { key, holders } => {
            details.set_item("key", key.to_string())?;
            details.set_item("holders", names(holders))?;
            "StateInUse"
        }
        Error::Busy { key, leader } => {
            details.set_item("key", key.to_string())?;
            details.set_item("leader", leader.to_string())?;
            "StateInUse"
        }
        Error::NotReady { key } | Error::StaleTicket { key } => {
            details.set_item("key", key.to_string())?;
            "DistGuardError"
        }
    };
    make(py, class, &error.to_string(), &details)
}

fn add_owner(details: &Bound<'_, PyDict>, owner: &Owner) -> PyResult<()> {
    details.set_item("leader", owner.leader.to_string())?;
    details.set_item("leader_thread", owner.leader.thread.0)?;
    details.set_item("leading_for", owner.age.as_secs_f64())?;
    details.set_item("holders", names(&owner.holders))
}

fn names(holders: &[Holder]) -> Vec<&str> {
    holders.iter().map(|holder| holder.name.as_str()).collect()
}
