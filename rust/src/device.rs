//! The current CUDA device of a thread: a runner's code computes on the runner's own one.
//!
//! torch keeps it for each thread, and SGLang sets it once, in the thread that builds the runner
//! (0.5.23). So a step of a runner that has a device sets it, and restores the caller's.

use distguard_core::actor::ThreadId;
use pyo3::intern;
use pyo3::prelude::*;

use crate::convert;

/// Whether the calling thread runs an asyncio loop, whose tasks share the current device.
pub fn is_shared(py: Python<'_>) -> PyResult<bool> {
    let asyncio = py.import(intern!(py, "asyncio"))?;
    Ok(!asyncio
        .call_method0(intern!(py, "_get_running_loop"))?
        .is_none())
}

/// A device that was made current, until `restore`.
pub struct OnDevice {
    before: i32,
    thread: ThreadId,
}

impl OnDevice {
    /// Makes device `index` current in the calling thread.
    pub fn enter(py: Python<'_>, index: i32) -> PyResult<Self> {
        let cuda = py.import(intern!(py, "torch.cuda"))?;
        let before = cuda.call_method1(intern!(py, "_exchange_device"), (index,))?;
        Ok(Self {
            before: before.extract()?,
            thread: convert::this_thread(),
        })
    }

    /// Makes the former device current again. In another thread nothing was changed.
    pub fn restore(&self, py: Python<'_>) -> PyResult<()> {
        if self.thread == convert::this_thread() {
            let cuda = py.import(intern!(py, "torch.cuda"))?;
            // Makes no context on a device that had none.
            cuda.call_method1(intern!(py, "_maybe_exchange_device"), (self.before,))?;
        }
        Ok(())
    }
}
