"""sglang.srt.model_executor.model_runner_components.weight_updater: works in its runner's scope.

Code that updates weights calls this part of a runner, not the runner (0.5.23, `tp_worker`). An
update that captures graphs again is in the capture phase from the start. Two updates that entered
it from the load phase would wait for each other.

Weights that other runners share are not changed in place (``runner.weights``). SGLang's Scheduler
ends with an error that a method raises, so its own methods report the refusal in their answer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Optional

from sglang_distguard.context.scopes import scope_active
from sglang_distguard.errors import StateInUse
from sglang_distguard.hooks.model_runner import phase_of
from sglang_distguard.patching import Around, AroundMethods, WithinMethods
from sglang_distguard.runner import weights
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


#: Methods that write to the weights, or may.
_CHANGING = frozenset(
    [
        "update_weights_from_tensor",
        "load_weights_from_distributed",
        "update_weights_from_ipc",
        "begin_weight_update",
        "end_weight_update",
    ]
)
_SCHEDULERS = "sglang.srt.managers.scheduler_components.weight_updater"
#: Methods of the Scheduler's part -> the class of their answer (0.5.23).
_ANSWERS = {
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    "update_weights_from_ipc": "UpdateWeightsFromIPCReqOutput",
    "begin_weight_update": "BeginWeightUpdateReqOutput",
    "end_weight_update": "EndWeightUpdateReqOutput",
}


def _step_of(name: str) -> Optional[Callable[[Any], AbstractContextManager[Any]]]:
    if name == "update_weights_from_disk":
        return None
    phase: Phase = "forward" if name in _BESIDE_FORWARDS else "load"
    step_of = collective_step_of(name, phase, "get_model_runner")
    if name not in _CHANGING:
        return step_of

    @contextmanager
    def alone(updater: Any) -> Iterator[None]:
        with step_of(updater):
            weights.refuse_if_shared(updater.get_model_runner(), name)
            yield

    return alone


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
            weights.refuse_if_shared(self.get_model_runner(), step)
            return original(self, *args, **kwargs)

    return update_weights_from_disk


def _answering(original: Callable[..., Any]) -> Callable[..., Any]:
    name = original.__name__
    namespace = original.__globals__

    @functools.wraps(original)
    def answering(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # Also an update of the draft alone: it may use the target's own embeddings.
            weights.refuse_if_shared(self.tp_worker.model_runner, name)
            return original(self, *args, **kwargs)
        except StateInUse as error:
            return namespace[_ANSWERS[name]](success=False, message=str(error))

    return answering


CHANGES = (
    Around(MODULE, "WeightUpdater.update_weights_from_disk", _from_disk),
    WithinMethods(MODULE, "WeightUpdater", _step_of),
    AroundMethods(
        _SCHEDULERS, "SchedulerWeightUpdaterManager", _answering, only=frozenset(_ANSWERS)
    ),
)
