//! Every interleaving of two or three threads; where there are too many, every one with no more
//! preemptions than the model says. loom knows no time: a wake-up that is lost is a deadlock.
//!
//! `DISTGUARD_SHORT=1` takes the smaller bounds, `LOOM_MAX_PREEMPTIONS` one bound for all models.

#![cfg(loom)]

#[path = "loom/agreement.rs"]
mod agreement;
mod common;
#[path = "loom/explore.rs"]
mod explore;
#[path = "loom/leases.rs"]
mod leases;
#[path = "loom/line.rs"]
mod line;
#[path = "loom/phases.rs"]
mod phases;
#[path = "loom/slots.rs"]
mod slots;
#[path = "loom/waits.rs"]
mod waits;
