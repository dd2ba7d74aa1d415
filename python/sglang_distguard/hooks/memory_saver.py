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
#: Attribute of torch_memory_saver's object: what does its work, made once for all threads.
_MADE = "_sglang_distguard_made"


def tag_of_scope(tag: str) -> str:
    """Return ``tag`` for memory of the current scope only; the default scope uses SGLang's tag."""
    scope = _core.current_scope()
    return tag if scope is None else f"{tag} of scope {scope.id}"


def make_implementation(saver: Any) -> None:
    """Make what torch_memory_saver's one object works with, whichever threads come first.

    torch_memory_saver 0.0.10 makes it at its first use (`_ensure_initialized`). Of two threads that
    come at once, the second replaces what the first one made, and ends with an AttributeError.

    Args:
        saver: a ``TorchMemorySaver``.
    """
    chosen = getattr(saver, "_impl_ctor_kwargs", None)
    if chosen is None:  # it has been made
        return
    from torch_memory_saver import entrypoint

    made = entrypoint._TorchMemorySaverImpl(**chosen)
    # One step for all threads: what another thread made meanwhile is used by all.
    saver._impl = vars(saver).setdefault(_MADE, made)
    vars(saver).pop("_impl_ctor_kwargs", None)


def _tagged(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tagged(self: Any, tag: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, tag_of_scope(tag), *args, **kwargs)

    return tagged


def _region(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the memory pool that is made for a runner's tag end with the runner."""

    @functools.wraps(original)
    def region(self: Any, tag: str, *args: Any, **kwargs: Any) -> Any:
        own = tag_of_scope(tag)
        execution = _core.current_execution()
        runner = None if execution is None else execution.runner
        make_implementation(original.__globals__["_memory_saver"])
        if own != tag and runner is not None and runner.manager is None:
            runner.keep_part(functools.partial(_drop_pools, own))
        return original(self, own, *args, **kwargs)

    return region


def _drop_pools(tag: str) -> None:
    """Drop the pools of ``tag``: torch_memory_saver 0.0.10 keeps them for the life of the process.

    What is still allocated in a pool stays valid. `torch.cuda.empty_cache()`, which SGLang calls
    when it builds a runner, gives back to the GPU what is free in a dropped pool only.
    """
    from torch_memory_saver import torch_memory_saver

    pools = getattr(torch_memory_saver._impl, "_mem_pools", {})
    for key in [it for it in list(pools) if it[0] == tag]:
        pools.pop(key, None)


def _cuda_graph(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def cuda_graph(self: Any, **kwargs: Any) -> Any:
        make_implementation(original.__globals__["_memory_saver"])
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
    Around(_ADAPTER, f"{_SAVER}.region", _region, uses=("_memory_saver",)),
    *(Around(_ADAPTER, f"{_SAVER}.{name}", _tagged) for name in ("pause", "resume")),
    Around(_ADAPTER, f"{_SAVER}.cuda_graph", _cuda_graph, uses=("_memory_saver",)),
)
