"""Settings that SGLang applies to the whole process: runners that live at once must agree on them.

0.5.23: `enable_batch_invariant_mode` replaces kernels in torch's dispatcher,
`set_float32_matmul_precision("high")` is torch-wide, and `monkey_patch_p2p_access_check` removes
the check from SGLang's own modules. SGLang never undoes these changes.
"""

from __future__ import annotations

from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import generation
from sglang_distguard.distributed.keys import PROCESS
from sglang_distguard.sync.single_flight import run_once

#: Setting -> the value for which SGLang changes the process permanently; the other changes nothing.
_PERMANENT = {
    "enable_deterministic_inference": True,
    "enable_tf32_matmul": True,
    "enable_p2p_check": False,
}


def agree() -> None:
    """Join the process settings of the living runners, or be the first to choose them.

    Raises:
        SpecMismatch: a living runner has other settings, or an earlier one made a change that
            cannot be undone.
        StateInUse, AcquireTimeout, DeadlockError, PoisonedState: see ``run_once``.
    """
    requested = generation.current().process_settings()
    known: Optional[dict[str, Any]] = _core.resource(PROCESS)
    if known not in (None, requested) and all(
        requested[name] == value for name, value in known.items() if value == _PERMANENT[name]
    ):
        _core.forget(PROCESS)  # more may be set; does nothing while a runner holds it
    run_once(
        PROCESS,
        requested,
        observe=_identity,
        initialise=lambda: requested,
        adopt=lambda: (requested, requested),
        join=lambda joined: joined,
        undo=lambda: None,
    )


def _identity() -> Optional[int]:
    # No live object represents these settings; only the registry knows them.
    return None if _core.resource(PROCESS) is None else 0
