"""Settings that SGLang applies to the whole process: runners that live at once must agree on them.

0.5.23: `enable_batch_invariant_mode` replaces kernels in torch's dispatcher,
`set_float32_matmul_precision("high")` is torch-wide, and `monkey_patch_p2p_access_check` takes the check
out of SGLang's own modules; what is done is never undone.
"""

from __future__ import annotations

from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.distributed.keys import PROCESS
from sglang_distguard.sync.single_flight import run_once

#: Setting -> the value for which SGLang changes the process for good; the other leaves it alone.
_FOR_GOOD = {
    "enable_deterministic_inference": True,
    "enable_tf32_matmul": True,
    "enable_p2p_check": False,
}


def switches() -> dict[str, Any]:
    """What the current scope's configuration asks for."""
    from sglang.srt.runtime_context import get_exec, get_parallel

    execution = get_exec()
    return {
        "enable_deterministic_inference": bool(
            execution.deterministic.enable_deterministic_inference
        ),
        "enable_tf32_matmul": bool(execution.features.enable_tf32_matmul),
        "enable_p2p_check": bool(get_parallel().enable_p2p_check),
    }


def agree() -> None:
    """Join the settings that the runners of this process live with, or be the first.

    Raises:
        SpecMismatch: a runner lives with others, or one did that cannot be undone.
    """
    requested = switches()
    known: Optional[dict[str, Any]] = _core.resource(PROCESS)
    if known not in (None, requested) and all(
        requested[name] == value for name, value in known.items() if value == _FOR_GOOD[name]
    ):
        _core.forget(PROCESS)  # more may be set; nothing happens while a runner holds it
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
    # There is no object that these settings are; what the registry knows is all there is.
    return None if _core.resource(PROCESS) is None else 0
