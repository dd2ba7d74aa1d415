//! The promises of memory as functions of a runner's handle: converts, and raises nothing.

use distguard_core::budgets::Shortage;
use pyo3::prelude::*;

use crate::process::budgets;
use crate::runner::RunnerHandle;

/// What a runner may count on of its device's memory, in bytes.
#[pyclass(frozen, get_all, module = "sglang_distguard._core")]
pub struct Standing {
    room: u64,
    promised: u64,
    taken_beside: u64,
    others: u64,
    by_count: bool,
}

/// `room`, `left`, and the other runners with what each was promised.
type Refusal = (u64, u64, Vec<(String, u64)>);

/// Notes that the runner of `handle` comes to `device`. Returns the device's room; None if the caller
/// must measure it.
#[pyfunction]
pub fn open_budget(handle: &RunnerHandle, device: &str) -> Option<u64> {
    budgets().open(device, handle.id(), handle.target(), handle.name_ref())
}

/// Has `asked` bytes promised to the runner of `handle`; returns the refusal, or None.
#[pyfunction]
#[pyo3(signature = (handle, asked, *, free=None, room=None))]
pub fn promise_memory(
    handle: &RunnerHandle,
    asked: u64,
    free: Option<u64>,
    room: Option<u64>,
) -> Option<Refusal> {
    let promised = budgets().promise(handle.id(), asked, free, room);
    promised
        .err()
        .map(|it: Shortage| (it.room, it.left(), it.promised))
}

/// Notes what the tensors of the runner of `handle` take, and whether it has its pool.
#[pyfunction]
#[pyo3(signature = (handle, taken, *, sized=false))]
pub fn count_memory(handle: &RunnerHandle, taken: u64, sized: bool) {
    budgets().count(handle.id(), taken);
    if sized {
        budgets().sized(handle.id());
    }
}

/// What the runner of `handle` may count on; None before `open_budget`.
#[pyfunction]
pub fn standing_of(handle: &RunnerHandle) -> Option<Standing> {
    budgets().standing(handle.id()).map(|it| Standing {
        room: it.room,
        promised: it.promised,
        taken_beside: it.taken_beside,
        others: it.others,
        by_count: it.by_count,
    })
}

/// Takes back what was promised to the runner of `handle`, whose memory has been freed.
#[pyfunction]
pub fn end_budget(handle: &RunnerHandle) {
    if handle.is_of_this_process() {
        budgets().close(handle.id());
    }
}

/// Notes what `device` has free, unless that is known; returns its room.
#[pyfunction]
pub fn measured_room(device: &str, free: u64) -> u64 {
    budgets().measured(device, free)
}

/// The runners on `device`, and what each was promised or takes, oldest first.
#[pyfunction]
pub fn promised_memory(device: &str) -> Vec<(String, u64)> {
    budgets().promised(device)
}
