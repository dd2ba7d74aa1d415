//! Taking leases, releasing them, and telling a holder that its lease is broken.
//! A lease whose state ended while it was held never becomes valid again.

use crate::actor::Actor;
use crate::error::Error;
use crate::events::Event;
use crate::key::Key;
use crate::lease::{Broken, Holder, LeaseId};
use crate::policy::Decision;
use crate::registry::{Inner, Registry};

impl Registry {
    /// Takes a lease on each of `keys` as it is now, or on none.
    pub fn lease(&self, keys: &[Key], name: &str, actor: &Actor) -> Result<Vec<LeaseId>, Error> {
        let keys: Vec<_> = keys.iter().map(|key| (key, None)).collect();
        self.lease_each(&keys, name, actor)
    }

    /// As `lease`, for the generations that were joined or published. State that was torn down and
    /// made anew in between, perhaps with other values, is refused.
    pub fn lease_at(
        &self,
        keys: &[(Key, u64)],
        name: &str,
        actor: &Actor,
    ) -> Result<Vec<LeaseId>, Error> {
        let keys: Vec<_> = keys.iter().map(|(key, at)| (key, Some(*at))).collect();
        self.lease_each(&keys, name, actor)
    }

    /// As `lease_at` where a generation is given, and as `lease` where none is; takes all or none.
    pub fn lease_each(
        &self,
        keys: &[(&Key, Option<u64>)],
        name: &str,
        actor: &Actor,
    ) -> Result<Vec<LeaseId>, Error> {
        self.update(|inner, now| {
            let missing = keys.iter().find(|(key, at)| {
                let ready = inner.slot(key).filter(|slot| slot.ready().is_some());
                ready.is_none_or(|slot| at.is_some_and(|at| at != slot.generation()))
            });
            if let Some((key, _)) = missing {
                let error = Error::NotReady {
                    key: (*key).clone(),
                };
                return Err(inner.refuse(key, actor, error, now));
            }
            let holder = Holder {
                name: name.to_owned(),
                actor: actor.clone(),
                since: now,
            };
            let mut taken = Vec::with_capacity(keys.len());
            for (key, _) in keys {
                let id = LeaseId(inner.fresh_id());
                inner.slot_mut(key).lease(id, holder.clone());
                inner.record(Event::new(now, *key, actor, Decision::Lease).detail(name));
                taken.push(id);
            }
            Ok(taken)
        })
    }

    /// Releases a lease. False when it was already released, or its state is gone.
    pub fn release(&self, id: LeaseId) -> bool {
        self.update(|inner, now| {
            let mut slots = inner.slots.iter_mut();
            let released = slots.find_map(|(key, it)| Some((key.clone(), it.slot.release(id)?)));
            let Some((key, holder)) = released else {
                inner.broken.remove(&id);
                return false;
            };
            let event = Event::new(now, &key, &holder.actor, Decision::Release);
            inner.record(event.detail(holder.name));
            true
        })
    }

    /// Checks that every lease is valid: taken on its key, held, and its state neither gone nor
    /// being torn down. A holder calls this before it uses the state.
    pub fn check_leases(&self, leases: &[(Key, LeaseId)]) -> Result<(), Error> {
        let inner = self.lock();
        for (key, id) in leases {
            let slot = inner.slot(key);
            if slot.is_some_and(|slot| slot.holds(*id)) {
                continue;
            }
            let (by, how) = match (inner.broken.get(id), slot.and_then(|slot| slot.breaks(*id))) {
                (Some(broken), _) => (Some(broken.by.clone()), broken.how.clone()),
                (None, Some((by, why))) => (Some(by.clone()), by_force("is tearing it down", why)),
                (None, None) => (None, "the lease was already released".to_owned()),
            };
            return Err(Error::LeaseBroken {
                key: key.clone(),
                by,
                how,
            });
        }
        Ok(())
    }
}

impl Inner {
    /// Records the leases that the last transition of `key` broke, to tell their holders.
    pub fn break_leases(&mut self, key: &Key, by: &Actor, how: &str) {
        let orphans = self.slot_mut(key).take_orphans();
        for id in orphans.into_keys() {
            let (by, how) = (by.clone(), how.to_owned());
            self.broken.insert(id, Broken { by, how });
        }
    }
}

/// What a forced teardown does, in words, and why, unless that is empty.
pub(crate) fn by_force(does: &str, why: &str) -> String {
    let because = if why.is_empty() { "" } else { ", because " };
    format!("{does} by force{because}{why}")
}
