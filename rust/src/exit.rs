//! The interpreter's exit: daemon threads are kept from touching Python once it has begun.
//!
//! CPython (up to 3.13) ends a thread that takes the GIL of an interpreter that is being finalised.
//! It calls `pthread_exit`, which unwinds the native frames below; in Rust and in torch that aborts
//! the process. So once our `atexit` handler runs, a thread that returns from a wait or enters a
//! runner's method stops here permanently, detached. The handler gives threads inside a method some
//! time to leave it. Code that only idles in `activate` is not inside a method.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::process::{calls, registry};

/// `ME` of the thread that ends the interpreter, the only one that goes on; 0 before the exit.
static EXITING: AtomicU64 = AtomicU64::new(0);

static NEXT: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static ME: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
}

/// How many threads are inside a runner's method.
static INSIDE: AtomicUsize = AtomicUsize::new(0);

/// How long the handler sleeps between looks at `INSIDE`.
const LOOK: Duration = Duration::from_millis(5);

fn must_stop() -> bool {
    let exiting = EXITING.load(Ordering::Acquire);
    exiting != 0 && ME.with(|me| *me != exiting)
}

fn stop_for_good() -> ! {
    loop {
        thread::park();
    }
}

/// Runs `wait` detached; does not return if another thread ends the interpreter meanwhile.
pub fn wait_detached(py: Python<'_>, wait: impl FnOnce() + Send) {
    py.detach(|| {
        wait();
        if must_stop() {
            stop_for_good();
        }
    });
}

/// Stops the calling thread permanently if the interpreter exits; `inside`: it is in a step.
pub fn stop_if_exiting(py: Python<'_>, inside: bool) {
    if must_stop() {
        if inside {
            INSIDE.fetch_sub(1, Ordering::AcqRel);
        }
        py.detach(|| stop_for_good());
    }
}

/// The calling thread enters a step; `outermost`: it was in none before.
pub fn going_in(outermost: bool) {
    if outermost {
        INSIDE.fetch_add(1, Ordering::AcqRel);
    }
}

/// The calling thread has left a step; `outermost`: it is in none now.
pub fn came_out(outermost: bool) {
    if outermost {
        INSIDE.fetch_sub(1, Ordering::AcqRel);
    }
}

/// For a forked child, which has only the forking thread; `inside`: that thread is in a method.
pub fn start_afresh(inside: bool) {
    EXITING.store(0, Ordering::Release);
    INSIDE.store(usize::from(inside), Ordering::Release);
}

/// Wakes every waiting thread, which then sees that the interpreter is about to exit.
#[pyfunction]
pub fn wake_all() {
    registry().wake_all();
    calls().wake_all();
}

/// Stops all other threads at their next wait or method; the calling thread ends the interpreter.
/// Waits up to `grace` seconds for threads inside a method. Returns how many are still inside.
#[pyfunction]
pub fn begin_exit(py: Python<'_>, grace: f64) -> usize {
    EXITING.store(ME.with(|me| *me), Ordering::Release);
    wake_all();
    let until = Duration::try_from_secs_f64(grace).unwrap_or(Duration::ZERO);
    let start = Instant::now();
    py.detach(|| {
        while INSIDE.load(Ordering::Acquire) > 0 && start.elapsed() < until {
            thread::sleep(LOOK);
        }
    });
    INSIDE.load(Ordering::Acquire)
}
