//! Converts between the core's plain data and Python's.

use std::cell::RefCell;
use std::ffi::c_ulong;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use distguard_core::actor::{Actor, ThreadId};
use distguard_core::events::Event;
use distguard_core::key::Key;
use distguard_core::phases::Visit;
use distguard_core::slot::Origin;
use distguard_core::snapshot::{SlotSnapshot, SlotState, Snapshot};
use distguard_core::spec::{Spec, Value};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use pyo3::IntoPyObjectExt;

pub fn key(text: &str) -> PyResult<Key> {
    Key::from_str(text).map_err(PyValueError::new_err)
}

/// The calling thread's number, as `threading` knows it.
pub fn this_thread() -> ThreadId {
    // SAFETY: takes nothing, and may be called on any thread.
    ThreadId(unsafe { PyThread_get_thread_ident() })
}

extern "C" {
    /// In CPython's stable ABI, and not in `pyo3::ffi`.
    fn PyThread_get_thread_ident() -> c_ulong;
}

/// A duration from Python's seconds; an infinite or invalid number becomes the longest duration.
pub fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// The calling thread, as `threading` knows it.
pub fn actor(py: Python<'_>, runner: Option<String>) -> PyResult<Actor> {
    NAME.with(|known| *known.borrow_mut() = None); // the thread may have been renamed
    this_actor(py, runner.map(Arc::from))
}

thread_local! {
    static NAME: RefCell<Option<Arc<str>>> = const { RefCell::new(None) };
}

/// Like `actor`, with the thread's name as it was last looked up: steps are frequent.
pub fn this_actor(py: Python<'_>, runner: Option<Arc<str>>) -> PyResult<Actor> {
    let known = NAME.with(|known| known.borrow().clone());
    let thread_name = if let Some(name) = known {
        name
    } else {
        let threading = py.import("threading")?;
        let name = threading.call_method0("current_thread")?.getattr("name")?;
        let name: Arc<str> = name.str()?.to_string_lossy().into();
        NAME.with(|known| *known.borrow_mut() = Some(name.clone()));
        name
    };
    Ok(Actor {
        thread: this_thread(),
        thread_name,
        runner,
    })
}

/// Whether `thread` runs Python now.
pub fn is_alive(py: Python<'_>, thread: ThreadId) -> PyResult<bool> {
    let frames = py.import("sys")?.call_method0("_current_frames")?;
    frames.contains(thread.0)
}

/// The value of the argument `name`, which must fit into 64 bits without a sign.
pub fn whole(name: &str, value: &Bound<'_, PyInt>) -> PyResult<u64> {
    let found = value.extract();
    found.map_err(|_| {
        PyValueError::new_err(format!("{name} must be an integer from 0 to 2**64 - 1"))
    })
}

/// How deep lists may be nested in a field: a list that contains itself has no end.
const DEPTH: usize = 16;

pub fn spec(fields: &Bound<'_, PyDict>) -> PyResult<Spec> {
    let field = |(field, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let Ok(name) = field.extract::<String>() else {
            let text = format!(
                "spec: the name of a field must be text, not {}",
                shown(&field)
            );
            return Err(PyTypeError::new_err(text));
        };
        let value = value_from_python(&value, DEPTH).map_err(|error| {
            let text = format!("spec: field {name:?}: {error}");
            let named = PyValueError::new_err(text);
            named.set_cause(value.py(), Some(error));
            named
        })?;
        Ok((name, value))
    };
    fields.iter().map(field).collect()
}

fn shown(value: &Bound<'_, PyAny>) -> String {
    let text = value.repr().map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_else(|_| "an object that cannot be printed".to_owned())
}

/// Objects that are not plain values (devices, dtypes, enums) are compared by their printed text.
fn value_from_python(value: &Bound<'_, PyAny>, depth: usize) -> PyResult<Value> {
    if depth == 0 {
        let text = format!("lists are nested more than {DEPTH} levels deep");
        return Err(PyValueError::new_err(text));
    }
    if value.is_none() {
        Ok(Value::Null)
    } else if value.is_instance_of::<PyBool>() {
        Ok(Value::Bool(value.extract()?))
    } else if value.is_instance_of::<PyInt>() {
        match value.extract() {
            Ok(number) => Ok(Value::Int(number)),
            Err(_) => Ok(Value::Str(value.str()?.to_string())),
        }
    } else if value.is_instance_of::<PyFloat>() {
        Ok(Value::Float(value.extract()?))
    } else if value.is_instance_of::<PyString>() {
        Ok(Value::Str(value.extract()?))
    } else if value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>() {
        let items = value.try_iter()?;
        let items = items.map(|item| value_from_python(&item?, depth - 1));
        Ok(Value::List(items.collect::<PyResult<_>>()?))
    } else {
        Ok(Value::Str(value.str()?.to_string()))
    }
}

pub fn value_to_python<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::Null => Ok(py.None().into_bound(py)),
        Value::Bool(value) => value.into_bound_py_any(py),
        Value::Int(value) => value.into_bound_py_any(py),
        Value::Float(value) => value.into_bound_py_any(py),
        Value::Str(value) => value.into_bound_py_any(py),
        Value::List(values) => {
            let items = values.iter().map(|value| value_to_python(py, value));
            PyList::new(py, items.collect::<PyResult<Vec<_>>>()?)?.into_bound_py_any(py)
        }
    }
}

pub fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::Created => "created",
        Origin::Adopted => "adopted",
    }
}

fn actor_to_python<'py>(py: Python<'py>, actor: &Actor) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("thread", actor.thread.0)?;
    out.set_item("thread_name", &*actor.thread_name)?;
    out.set_item("runner", actor.runner.as_deref())?;
    Ok(out)
}

fn spec_to_python<'py>(py: Python<'py>, spec: &Spec) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    for (field, value) in spec.iter() {
        out.set_item(field, value_to_python(py, value)?)?;
    }
    Ok(out)
}

/// The registry as the dict that `sglang_distguard.snapshot()` documents.
pub fn snapshot<'py>(py: Python<'py>, snapshot: &Snapshot) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("at", snapshot.at.as_secs_f64())?;
    let slots = snapshot.slots.iter().map(|slot| slot_to_python(py, slot));
    out.set_item(
        "slots",
        PyList::new(py, slots.collect::<PyResult<Vec<_>>>()?)?,
    )?;
    let visits = snapshot
        .visits
        .iter()
        .map(|visit| visit_to_python(py, visit));
    out.set_item(
        "phases",
        PyList::new(py, visits.collect::<PyResult<Vec<_>>>()?)?,
    )?;
    out.set_item("events", events(py, &snapshot.events)?)?;
    out.set_item("dropped_events", snapshot.dropped_events)?;
    Ok(out)
}

pub fn events<'py>(py: Python<'py>, events: &[Event]) -> PyResult<Bound<'py, PyList>> {
    let events = events.iter().map(|event| event_to_python(py, event));
    PyList::new(py, events.collect::<PyResult<Vec<_>>>()?)
}

fn visit_to_python<'py>(py: Python<'py>, visit: &Visit) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("phase", visit.access.to_string())?;
    out.set_item("step", visit.step.as_deref())?;
    out.set_item("by", actor_to_python(py, &visit.actor)?)?;
    out.set_item("inside", visit.inside)?;
    out.set_item("since", visit.since.as_secs_f64())?;
    Ok(out)
}

fn slot_to_python<'py>(py: Python<'py>, slot: &SlotSnapshot) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("key", slot.key.to_string())?;
    out.set_item("generation", slot.generation)?;
    out.set_item("waiters", slot.waiters)?;
    out.set_item("failures", slot.failures)?;
    out.set_item("last_failure", &slot.last_failure)?;
    let holders = PyList::empty(py);
    let empty = Spec::default();
    let (state, by, since, spec, made, reason) = match &slot.state {
        SlotState::Idle => ("idle", None, None, &empty, None, None),
        SlotState::Running {
            leader,
            since,
            spec,
            teardown,
        } => {
            let state = if *teardown { "teardown" } else { "running" };
            (state, Some(leader), Some(since), spec, None, None)
        }
        SlotState::Ready {
            by,
            since,
            spec,
            origin,
            holders: leases,
        } => {
            for holder in leases {
                let entry = PyDict::new(py);
                entry.set_item("name", &holder.name)?;
                entry.set_item("thread_name", &*holder.actor.thread_name)?;
                entry.set_item("since", holder.since.as_secs_f64())?;
                holders.append(entry)?;
            }
            ("ready", Some(by), Some(since), spec, Some(*origin), None)
        }
        SlotState::Poisoned { reason, by, since } => (
            "poisoned",
            Some(by),
            Some(since),
            &empty,
            None,
            Some(reason),
        ),
    };
    out.set_item("state", state)?;
    out.set_item("by", by.map(|by| actor_to_python(py, by)).transpose()?)?;
    out.set_item("since", since.map(Duration::as_secs_f64))?;
    out.set_item("spec", spec_to_python(py, spec)?)?;
    out.set_item("origin", made.map(origin))?;
    out.set_item("reason", reason)?;
    out.set_item("holders", holders)?;
    Ok(out)
}

fn event_to_python<'py>(py: Python<'py>, event: &Event) -> PyResult<Bound<'py, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("seq", event.seq)?;
    out.set_item("at", event.at.as_secs_f64())?;
    out.set_item("key", event.subject.to_string())?;
    out.set_item("actor", actor_to_python(py, &event.actor)?)?;
    out.set_item("decision", event.decision.word())?;
    out.set_item("generation", event.generation)?;
    out.set_item("waited", event.waited.as_secs_f64())?;
    out.set_item("detail", &event.detail)?;
    Ok(out)
}
