//! The claim of one publish, for as long as any execution holds it. `distguard_core::scopes`
//! decides which scope a publish gets.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use distguard_core::scopes::{ClaimId, ScopeId};

use crate::process::{self, forks};
use crate::sync::lock;

/// Released when the last execution that holds it is gone.
pub struct Claim {
    pub id: ClaimId,
    pub scope: ScopeId,
    forks: u32,
}

/// Claims by number, so that another execution can hold the same claim.
fn known() -> &'static Mutex<HashMap<ClaimId, Weak<Claim>>> {
    static KNOWN: std::sync::OnceLock<Mutex<HashMap<ClaimId, Weak<Claim>>>> =
        std::sync::OnceLock::new();
    KNOWN.get_or_init(Mutex::default)
}

impl Claim {
    /// Holds a claim that the ledger has given out.
    pub fn new(id: ClaimId, scope: ScopeId) -> Arc<Self> {
        let claim = Arc::new(Self {
            id,
            scope,
            forks: forks(),
        });
        lock(known()).insert(id, Arc::downgrade(&claim));
        claim
    }

    /// The claim `id` of `scope`, which other executions may hold already.
    pub fn share(id: ClaimId, scope: ScopeId) -> Arc<Self> {
        let held = lock(known()).get(&id).and_then(Weak::upgrade);
        held.unwrap_or_else(|| Self::new(id, scope))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(known()).remove(&self.id);
        // A forked child's ledger is not the one that gave the claim out.
        if self.forks == forks() {
            process::scopes().with(|ledger| ledger.release(self.scope, self.id));
        }
    }
}
