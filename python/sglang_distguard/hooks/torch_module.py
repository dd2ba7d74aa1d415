"""torch.nn: a model's replacement of ``Module.register_parameter`` applies to its thread only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.context.register_parameter import of_thread, thread_register_parameter
from sglang_distguard.patching import Around


def _register_parameter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def register_parameter(self: Any, name: str, param: Any) -> None:
        override = of_thread()
        if override is None:
            original(self, name, param)
            return
        # The override calls the function that it replaced, which is torch's.
        with thread_register_parameter(None):
            override(self, name, param)

    return register_parameter


CHANGES = (Around("torch.nn.modules.module", "Module.register_parameter", _register_parameter),)
