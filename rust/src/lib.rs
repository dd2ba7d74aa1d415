//! The native module `sglang_distguard._core`: an export list. Logic lives in `distguard-core`.

mod activation;
mod agreement;
mod attached;
mod budgets;
mod calls;
mod claim;
mod collecting;
mod convert;
mod device;
mod direct_read;
mod dtype;
mod early_reads;
mod errors;
mod execution;
mod exit;
mod flag;
mod in_turn;
mod leasing;
mod locked;
mod phase;
mod process;
mod publishing;
mod read_path;
mod registry;
mod remembered;
mod runner;
mod scope;
mod scoped_global;
mod step;
mod sync;
mod through;
mod weak_list;

use pyo3::prelude::*;

/// Native part of `sglang_distguard`; see `_core.pyi` for what each name does.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::activation::{activations, Activation};
    #[pymodule_export]
    use crate::agreement::Agreement;
    #[pymodule_export]
    use crate::budgets::{
        count_memory, end_budget, measured_room, open_budget, promise_memory, promised_memory,
        standing_of, Standing,
    };
    #[pymodule_export]
    use crate::calls::calls_inside;
    #[pymodule_export]
    use crate::dtype::note_intercepting;
    #[pymodule_export]
    use crate::early_reads::{
        call_after_builds, give_own_code, note_build, read_through_accessors,
    };
    #[pymodule_export]
    use crate::execution::{
        adopt_execution, carried_execution, current_execution, default_dtype_in_force, depth,
        in_scope, in_turn, owning_environment, run_as, set_default_dtype, with_default_dtype,
        Entered, Execution,
    };
    #[pymodule_export]
    use crate::exit::{begin_exit, wake_all};
    #[pymodule_export]
    use crate::flag::OwnFlag;
    #[pymodule_export]
    use crate::in_turn::StepInTurn;
    #[pymodule_export]
    use crate::locked::Locked;
    #[pymodule_export]
    use crate::phase::Visit;
    #[pymodule_export]
    use crate::publishing::{resuming, Publishing, Vacancy};
    #[pymodule_export]
    use crate::registry::{
        begin_teardown, forget, holders, inherit, is_ready, ready_keys, reset, resource, snapshot,
        start_afresh, take_events, Claim, Request, Teardown,
    };
    #[pymodule_export]
    use crate::runner::RunnerHandle;
    #[pymodule_export]
    use crate::scope::{
        current_scope, has_joined, live_residents, live_runners, live_scopes, new_scope,
        note_joined, Scope,
    };
    #[pymodule_export]
    use crate::scoped_global::ScopedGlobal;
    #[pymodule_export]
    use crate::step::{step, Step, StepOf};
    #[pymodule_export]
    use crate::through::Through;

    #[pymodule_init]
    fn init(module: &super::Bound<'_, super::PyModule>) -> super::PyResult<()> {
        crate::execution::make_variable(module.py())?;
        crate::direct_read::put_in_front(module.py());
        super::PyModuleMethods::add(module, "__version__", env!("CARGO_PKG_VERSION"))
    }
}
