"""torch_memory_saver: release and resume the memory of one runner, while it does nothing else.

SGLang's Scheduler does this (0.5.23, `SchedulerWeightUpdaterManager`) by tags that all memory of
the process shares. Releasing "weights" would take away the weights of every other runner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.patching import Around, Within
from sglang_distguard.runner.collective_steps import collective_step_of

_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater"
_ADAPTER = "sglang.srt.utils.torch_memory_saver_adapter"
#: The adapter that is used when the saver is enabled; the other one does nothing.
_SAVER = "_TorchMemorySaverAdapterReal"


def tag_of_scope(tag: str) -> str:
    """Return ``tag`` for memory of the current scope only; the default scope uses SGLang's tag."""
    scope = _core.current_scope()
    return tag if scope is None else f"{tag} of scope {scope.id}"


def _tagged(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tagged(self: Any, tag: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, tag_of_scope(tag), *args, **kwargs)

    return tagged


def _cuda_graph(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cuda_graph(self: Any, **kwargs: Any) -> Any:
        if "tag" in kwargs:
            kwargs["tag"] = tag_of_scope(kwargs["tag"])
        return original(self, **kwargs)

    return cuda_graph


CHANGES = (
    # With several ranks, the ranks meet in a barrier.
    *(
        Within(
            _MANAGER,
            f"SchedulerWeightUpdaterManager.{name}",
            collective_step_of(name, "load", "tp_worker.model_runner"),
        )
        for name in ("release_memory_occupation", "resume_memory_occupation")
    ),
    *(Around(_ADAPTER, f"{_SAVER}.{name}", _tagged) for name in ("region", "pause", "resume")),
    Around(_ADAPTER, f"{_SAVER}.cuda_graph", _cuda_graph),
)
