//! Every interleaving of two or three threads. Where there are too many, every interleaving with at
//! most as many preemptions as the model says. loom has no time: a lost wake-up is a deadlock.
//!
//! `DISTGUARD_SHORT=1` takes the smaller bounds, `LOOM_MAX_PREEMPTIONS` one bound for all models.

#![cfg(loom)]

#[path = "loom/agreement.rs"]
mod agreement;
#[path = "loom/calls.rs"]
mod calls;
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
