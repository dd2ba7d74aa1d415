//! The native module `sglang_distguard._core`: an export list. Logic lives in `distguard-core`.

mod agreement;
mod convert;
mod errors;
mod exit;
mod process;
mod registry;
mod room;
mod runner;
mod scope;
mod scoped_global;
mod sync;

use pyo3::prelude::*;

/// Native part of `sglang_distguard`; see `_core.pyi` for what each name does.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::agreement::Agreement;
    #[pymodule_export]
    use crate::exit::begin_exit;
    #[pymodule_export]
    use crate::registry::{
        begin_teardown, forget, inherit, is_ready, ready_keys, reset, resource, snapshot,
        start_afresh, take_events, Claim, Request, Teardown,
    };
    #[pymodule_export]
    use crate::room::Visit;
    #[pymodule_export]
    use crate::runner::RunnerHandle;
    #[pymodule_export]
    use crate::scope::{
        abandon_scope, adopt_scope, choose_scope, claim_vacant, current_scope, depth, enter,
        has_joined, leave, live_runners, live_scopes, new_scope, note_joined, switch, switch_back,
        Scope,
    };
    #[pymodule_export]
    use crate::scoped_global::ScopedGlobal;

    #[pymodule_init]
    fn init(module: &super::Bound<'_, super::PyModule>) -> super::PyResult<()> {
        super::PyModuleMethods::add(module, "__version__", env!("CARGO_PKG_VERSION"))
    }
}
