//! A ticket that resolves itself: when a leader dies, the next waiter leads.

use crate::error::Error;
use crate::registry::Registry;
use crate::slot::{Origin, Ticket};
use crate::spec::Spec;

/// Fails the slot when dropped, unless the leader resolved it before.
#[must_use = "a guard that is dropped fails its slot"]
pub struct LeadGuard<'a> {
    registry: &'a Registry,
    ticket: Option<Ticket>,
}

impl<'a> LeadGuard<'a> {
    /// Guards `ticket`.
    pub fn new(registry: &'a Registry, ticket: Ticket) -> Self {
        Self {
            registry,
            ticket: Some(ticket),
        }
    }

    /// See `Registry::publish`.
    pub fn publish(self, spec: Spec, origin: Origin, identity: u64) -> Result<u64, Error> {
        let (registry, ticket) = self.disarm();
        registry.publish(ticket, spec, origin, identity)
    }

    /// See `Registry::fail`.
    pub fn fail(self, reason: &str) -> bool {
        let (registry, ticket) = self.disarm();
        registry.fail(ticket, reason)
    }

    /// See `Registry::poison`.
    pub fn poison(self, reason: &str) -> bool {
        let (registry, ticket) = self.disarm();
        registry.poison(ticket, reason)
    }

    /// See `Registry::end_teardown`.
    pub fn end_teardown(self) -> bool {
        let (registry, ticket) = self.disarm();
        registry.end_teardown(ticket)
    }

    fn disarm(mut self) -> (&'a Registry, Ticket) {
        let ticket = self.ticket.take();
        let ticket = ticket.expect("only methods that consume the guard take its ticket");
        (self.registry, ticket)
    }
}

impl Drop for LeadGuard<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let reason = if std::thread::panicking() {
                "the leader panicked"
            } else {
                "the leader ended without a result"
            };
            self.registry.fail(ticket, reason);
        }
    }
}
