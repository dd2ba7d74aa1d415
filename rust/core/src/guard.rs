//! A ticket that fails by itself: a leader that dies hands over to the next waiter.

use crate::error::Error;
use crate::registry::Registry;
use crate::slot::{Origin, Ticket};
use crate::spec::Spec;

/// Fails the slot when dropped, unless the leader published, failed or poisoned it before.
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

    /// Publishes; see `Registry::publish`.
    pub fn publish(mut self, spec: Spec, origin: Origin, identity: u64) -> Result<u64, Error> {
        let ticket = self
            .ticket
            .take()
            .expect("a guard is used up only by value");
        self.registry.publish(ticket, spec, origin, identity)
    }
}

impl Drop for LeadGuard<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.registry
                .fail(ticket, "the leader ended without a result");
        }
    }
}
