"""sglang.srt.distributed.bootstrap: the run-once flag of `init_parallel_runtime`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core, runners, settings
from sglang_distguard.patching import Around
from sglang_distguard.scoping import accessor

MODULE = "sglang.srt.distributed.bootstrap"


def _init_parallel_runtime(original: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang sets its flag first and never clears it (0.5.23), so that a retry "ran twice".

    What may run once is guarded where it happens, by the world and groups hooks.
    """

    @functools.wraps(original)
    def init_parallel_runtime(*args: Any, **kwargs: Any) -> Any:
        ran = accessor(MODULE, "_PARALLEL_INITIALISED")
        if settings.current().reuse:
            ran.value = False
        before = ran.value
        token = _core.enter(_core.current_scope())  # as in the runner's methods
        try:
            return original(*args, **kwargs)
        except BaseException:
            ran.value = before
            raise
        finally:
            runners.leave(token)

    return init_parallel_runtime


CHANGES = (Around(MODULE, "init_parallel_runtime", _init_parallel_runtime),)
