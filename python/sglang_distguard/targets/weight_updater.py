"""sglang.srt.model_executor.model_runner_components.weight_updater: works in its runner's scope.

Whoever updates weights calls this part of a runner, not the runner (0.5.23, `tp_worker`). An update
that captures graphs anew is in the room for captures from the start: two that went there from the
room for loads would wait for each other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sglang_distguard import rooms, runners
from sglang_distguard.patching import AroundMethods
from sglang_distguard.targets.model_runner import room_of

#: Parameter of `update_weights_from_disk`.
_RECAPTURE = "recapture_cuda_graph"


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self.get_model_runner())
        if handle is None:
            return original(self, *args, **kwargs)
        call = signature.bind_partial(self, *args, **kwargs).arguments
        token = handle.enter()
        try:
            room = room_of("recapture_decode_cuda_graph" if call.get(_RECAPTURE) else "load_model")
            if room == "capture":
                runners.refuse_capture_without_turns(handle)
            with runners.in_order(handle, step), rooms.room(room, handle.name):
                return original(self, *args, **kwargs)
        finally:
            runners.leave(token)

    return method


CHANGES = (
    AroundMethods(
        "sglang.srt.model_executor.model_runner_components.weight_updater",
        "WeightUpdater",
        make=_method,
    ),
)
