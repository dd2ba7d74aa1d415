//! Runs a model and prints how many interleavings there were; helpers that all models share.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use distguard_core::error::Error;
use distguard_core::registry::{Observed, Registry, Request, Step};
use distguard_core::slot::{Origin, Ticket};
use loom::cell::UnsafeCell;
use loom::thread::{self, JoinHandle};

use crate::common;

/// How many preemptions are allowed; a switch away from a waiting thread does not count.
#[derive(Clone, Copy)]
pub enum Bound {
    /// Any number: every possible interleaving.
    None,
    /// This many, and fewer in the short form.
    Preemptions { full: usize, short: usize },
}

/// Runs `model` once per interleaving.
pub fn explore(bound: Bound, model: impl Fn() + Sync + Send + 'static) {
    let short = std::env::var("DISTGUARD_SHORT").is_ok_and(|it| it == "1");
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(match bound {
        Bound::None => None,
        Bound::Preemptions { short: most, .. } if short => Some(most),
        Bound::Preemptions { full, .. } => Some(full),
    });
    let bounded = builder.preemption_bound.map_or("all".to_owned(), |most| {
        format!("with up to {most} preemptions")
    });
    let explored = Arc::new(AtomicUsize::new(0));
    let counted = explored.clone();
    let began = Instant::now();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!(
        "\ncounted: {}: {} interleavings, {bounded}, {:.1} s",
        std::thread::current().name().unwrap_or("?"),
        explored.load(Ordering::Relaxed),
        began.elapsed().as_secs_f64()
    );
}

pub fn shared() -> Arc<Registry> {
    Arc::new(common::registry())
}

/// Starts a thread that runs `body` with the registry.
pub fn spawn<T: 'static>(
    registry: &Arc<Registry>,
    body: impl FnOnce(&Registry) -> T + 'static,
) -> JoinHandle<T> {
    let registry = registry.clone();
    thread::spawn(move || body(&registry))
}

/// Waits for the threads to end.
pub fn all<T, const N: usize>(threads: [JoinHandle<T>; N]) -> [T; N] {
    threads.map(|thread| thread.join().unwrap())
}

/// Acquires, and waits without a deadline.
pub fn blocking(registry: &Registry, request: Request) -> Result<Step, Error> {
    common::acquire(registry, request, || Observed::Unknown)
}

pub fn publish(registry: &Registry, ticket: Ticket) -> u64 {
    let published = registry.publish(ticket, common::spec(1), Origin::Created, 7);
    published.expect("a leader's ticket is good")
}

/// A stand-in for the data that a key or a phase guards. loom reports two threads that access it,
/// one of them with a change, unless the registry orders them. That adds no interleavings, as a
/// look at a flag would.
#[derive(Clone, Default)]
pub struct Guarded(Arc<Cell>);

#[derive(Default)]
struct Cell(UnsafeCell<()>);

// SAFETY: the cell contains nothing.
unsafe impl Send for Cell {}
// SAFETY: as above; and loom checks every access, which is the purpose of the cell.
unsafe impl Sync for Cell {}

impl Guarded {
    pub fn change(&self) {
        self.0 .0.with_mut(|_| ());
    }

    pub fn read(&self) {
        self.0 .0.with(|_| ());
    }
}
