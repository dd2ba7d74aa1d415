"""sglang.srt.distributed.bootstrap: in which scope a runtime is initialised, and how often."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context.accessors import accessor
from sglang_distguard.context.scopes import of_published
from sglang_distguard.hooks.model_config import made_from
from sglang_distguard.patching import Around

MODULE = "sglang.srt.distributed.bootstrap"


def _init_parallel_runtime(original: Callable[..., Any]) -> Callable[..., Any]:
    """Restore SGLang's run-once flag on failure, and clear it before each run if reuse is allowed.

    SGLang sets the flag first and never clears it (0.5.23), so a retry fails with "ran twice". The
    work that may run only once is guarded by the world and groups hooks.
    """

    @functools.wraps(original)
    def init_parallel_runtime(*args: Any, **kwargs: Any) -> Any:
        with of_published(kwargs.get("server_args")), _core.owning_environment():
            ran = accessor(MODULE, "_PARALLEL_INITIALISED")
            before = False if settings.current().reuse else ran.value
            ran.value = before
            try:
                return original(*args, **kwargs)
            except BaseException:
                ran.value = before
                raise

    return init_parallel_runtime


def _init_layer_runtime(original: Callable[..., Any]) -> Callable[..., Any]:
    """Run in the scope that the argument ``model_config`` identifies (0.5.23)."""

    @functools.wraps(original)
    def init_layer_runtime(*args: Any, **kwargs: Any) -> Any:
        with of_published(made_from(kwargs.get("model_config"))):
            return original(*args, **kwargs)

    return init_layer_runtime


CHANGES = (
    Around(MODULE, "init_parallel_runtime", _init_parallel_runtime),
    Around(MODULE, "init_layer_runtime", _init_layer_runtime),
)
