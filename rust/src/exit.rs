//! The interpreter's exit: daemon threads are kept from touching Python once it has begun.
//!
//! A thread that takes the GIL of an interpreter that is being finalised is ended by CPython (up to
//! 3.13) with `pthread_exit`, which unwinds the native frames below it; in Rust and in torch that
//! aborts the process. So from the moment our `atexit` handler runs, whoever comes back from a wait
//! or enters a runner's method stops here for good, detached, and the handler gives those who are
//! inside a method some time to come out. Code that only idles in `activate` is inside of nothing.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::process::registry;

/// The thread that ends the interpreter, which alone goes on, by `ME`; 0 while nobody does.
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

/// Runs `wait` detached from the interpreter; comes back only if that still makes sense.
pub fn wait_detached(py: Python<'_>, wait: impl FnOnce() + Send) {
    py.detach(|| {
        wait();
        if must_stop() {
            stop_for_good();
        }
    });
}

/// Stops the calling thread for good when the interpreter exits; `inside`: of a step already.
pub fn stop_if_exiting(py: Python<'_>, inside: bool) {
    if must_stop() {
        if inside {
            INSIDE.fetch_sub(1, Ordering::AcqRel);
        }
        py.detach(|| stop_for_good());
    }
}

/// A thread goes into a step, from outside of all if `outermost`.
pub fn going_in(outermost: bool) {
    if outermost {
        INSIDE.fetch_add(1, Ordering::AcqRel);
    }
}

/// A thread came out of a step, and of all if `outermost`.
pub fn came_out(outermost: bool) {
    if outermost {
        INSIDE.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A forked child has only the forking thread, which is inside a method or not.
pub fn start_afresh(inside: bool) {
    EXITING.store(0, Ordering::Release);
    INSIDE.store(usize::from(inside), Ordering::Release);
}

/// Lets whoever waits look again, and see that the interpreter is about to exit.
#[pyfunction]
pub fn wake_all() {
    registry().wake_all();
}

/// The calling thread ends the interpreter: stop all others at their next wait or method, and wait
/// up to `grace` seconds for those inside a method. Returns how many still are.
#[pyfunction]
pub fn begin_exit(py: Python<'_>, grace: f64) -> usize {
    EXITING.store(ME.with(|me| *me), Ordering::Release);
    registry().wake_all();
    let until = Duration::try_from_secs_f64(grace).unwrap_or(Duration::ZERO);
    let start = Instant::now();
    py.detach(|| {
        while INSIDE.load(Ordering::Acquire) > 0 && start.elapsed() < until {
            thread::sleep(LOOK);
        }
    });
    INSIDE.load(Ordering::Acquire)
}
