"""sglang.srt.model_executor.model_runner_components.weight_updater: works in its runner's scope.

Code that updates weights calls this part of a runner, not the runner (0.5.23, `tp_worker`). An
update that captures graphs again is in the capture phase from the start. Two updates that entered
it from the load phase would wait for each other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.hooks.model_runner import phase_of
from sglang_distguard.patching import Around, WithinMethods
from sglang_distguard.runner.collective_steps import collective_step_of, step_among_ranks
from sglang_distguard.runner.handle import find_handle
from sglang_distguard.sync.phases import Phase

MODULE = "sglang.srt.model_executor.model_runner_components.weight_updater"
#: These methods change nothing of the runner, and wait for other processes. Forwards of the runner
#: continue meanwhile, unless it has several ranks: then each of these methods has a turn
#: (docs/COLLECTIVES.md).
_BESIDE_FORWARDS = frozenset({"init_weights_update_group", "receive_weights_from_distributed"})
#: Parameter of `update_weights_from_disk`.
_RECAPTURE = "recapture_cuda_graph"


def _step_of(name: str) -> Optional[_core.StepOf]:
    if name == "update_weights_from_disk":
        return None
    phase: Phase = "forward" if name in _BESIDE_FORWARDS else "load"
    return collective_step_of(name, phase, "get_model_runner")


def _from_disk(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def update_weights_from_disk(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = find_handle(self.get_model_runner())
        if handle is None:
            return original(self, *args, **kwargs)
        call = signature.bind_partial(self, *args, **kwargs).arguments
        with scope_active(handle.scope):
            phase = phase_of(
                "recapture_decode_cuda_graph" if call.get(_RECAPTURE) else "load_model"
            )
        with step_among_ranks(handle, step, phase, is_collective=True):
            return original(self, *args, **kwargs)

    return update_weights_from_disk


CHANGES = (
    Around(MODULE, "WeightUpdater.update_weights_from_disk", _from_disk),
    WithinMethods(MODULE, "WeightUpdater", _step_of),
)
