//! Taking and giving back the leases of a runner.

use distguard_core::key::Key;
use distguard_core::lease::LeaseId;
use distguard_core::scopes::ScopeId;
use pyo3::prelude::*;

use crate::convert;
use crate::errors::to_python;
use crate::process::{registry, scopes, set_resource};

/// Releases `lease`. Shared weights are forgotten with their last holder: no runner asks for them again.
pub fn release(key: &Key, lease: LeaseId) {
    registry().release(lease);
    if matches!(key, Key::Weights(_)) && registry().remove(key) {
        set_resource(key, None);
    }
}

/// Leases all `keys` or none. A key that the scope has joined is leased at the joined generation,
/// so that state that was torn down since, or made anew for other scopes, is refused.
pub fn lease(
    py: Python<'_>,
    scope: ScopeId,
    keys: Vec<Key>,
    name: &str,
) -> PyResult<Vec<(Key, LeaseId)>> {
    let actor = convert::actor(py, Some(name.to_owned()))?;
    let at = scopes().with(|ledger| {
        keys.iter()
            .map(|key| ledger.joined(scope, key))
            .collect::<Vec<_>>()
    });
    let wanted: Vec<_> = keys.iter().zip(at).collect();
    let leased = registry().lease_each(&wanted, name, &actor);
    let ids = leased.map_err(|error| to_python(py, &error))?;
    Ok(keys.into_iter().zip(ids).collect())
}
