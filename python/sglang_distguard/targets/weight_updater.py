"""sglang.srt.model_executor.model_runner_components.weight_updater: works in its runner's scope.

Whoever updates weights calls this part of a runner, not the runner (0.5.23, `tp_worker`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import rooms, runners
from sglang_distguard.patching import AroundMethods


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self.get_model_runner())
        if handle is None:
            return original(self, *args, **kwargs)
        token = handle.enter()
        try:
            with runners.in_order(handle, step), rooms.room("load", handle.name):
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
