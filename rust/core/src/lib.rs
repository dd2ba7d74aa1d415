//! The registry behind `sglang_distguard`: it decides which thread initialises shared state, which
//! threads join it, and which requests are refused.
//! Knows nothing of Python, SGLang or torch, holds no statics and never blocks with its lock held.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod acquire;
pub mod actor;
pub mod agreement;
pub mod budgets;
pub mod calls;
pub mod clock;
pub mod enter;
pub mod error;
pub mod events;
pub mod guard;
pub mod key;
pub mod lease;
mod leases;
pub mod occupancy;
pub mod phases;
pub mod policy;
pub mod registry;
pub mod request;
mod rules;
pub mod scopes;
pub mod slot;
pub mod snapshot;
pub mod spec;
mod sync;
pub mod teardown;
pub mod waitgraph;
