"""sglang.srt.model_executor.model_runner: a runner's methods run in its own scope, on any thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from sglang_distguard import rooms, runners
from sglang_distguard.patching import AroundMethods
from sglang_distguard.ranks import agreement

MODULE = "sglang.srt.model_executor.model_runner"


#: What computes together with the other ranks (0.5.23; docs/COLLECTIVES.md).
_COLLECTIVE = frozenset(
    {
        "alloc_memory_pool",
        "init_attention_backends",
        "init_cuda_graphs",
        "prewarm_sampling",
        "load_model",
        "forward",
        "forward_split_prefill",
        "sample",
        "compute_logprobs_only",
        "check_weights",
        "maybe_join_ep_ranks",
        "post_capture_resize_kv_pool",
        "recapture_decode_cuda_graph",
        "init_decode_cuda_graph",
        "init_prefill_cuda_graph",
        "finalize_startup_weight_load",
        "post_capture_elastic_ep_recover",
        "ensure_decode_cuda_graphs",
    }
)


#: Which room a step is in (rust/core/src/rooms.rs says which of them overlap); the others are in none.
_ROOMS: dict[str, rooms.Room] = {
    "load_model": "load",
    "alloc_memory_pool": "load",
    "init_attention_backends": "load",
    "post_capture_resize_kv_pool": "load",
    "finalize_startup_weight_load": "load",
    "forward": "forward",
    "forward_split_prefill": "forward",
    "sample": "forward",
    "compute_logprobs_only": "forward",
    "init_cuda_graphs": "capture",
    "recapture_decode_cuda_graph": "capture",
    "init_decode_cuda_graph": "capture",
    "init_prefill_cuda_graph": "capture",
    "ensure_decode_cuda_graphs": "capture",
}


def room_of(step: str) -> rooms.Room:
    """Which room a step of ``_ROOMS`` of the current scope's runner is in."""
    room = _ROOMS[step]
    return room if room != "capture" or _captures() else "load"


def _captures() -> bool:
    """Whether the current scope's runner captures graphs (0.5.23: `cuda_graph_setup`)."""
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.runtime_context import get_device, get_flags

    if get_device().device == "cpu":
        return get_flags().capture.enable_torch_compile
    phases = (Phase.PREFILL, Phase.DECODE)
    return not all(check_cuda_graph_backend(phase, Backend.DISABLED) for phase in phases)


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
    if original.__name__ in _ROOMS:
        original = _in_room(original)
    if original.__name__ in _COLLECTIVE:
        original = _in_order(original)
    if original.__name__ == "forward":
        original = _one_thread_at_a_time(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        token = handle.enter()
        try:
            return original(self, *args, **kwargs)
        finally:
            runners.leave(token)

    return method


def _in_order(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        with runners.in_order(handle, step):
            return original(self, *args, **kwargs)

    return method


def _in_room(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        room = room_of(step)
        if room == "capture":
            runners.refuse_capture_without_turns(handle)
        with rooms.room(room, handle.name):
            return original(self, *args, **kwargs)

    return method


def _one_thread_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        with runners.one_thread_at_a_time(handle):
            return original(self, *args, **kwargs)

    return forward


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if runners.find_handle(self) is not None:  # a subclass calling up
            original(self, *args, **kwargs)
            return
        with agreement.building():
            call = signature.bind_partial(self, *args, **kwargs).arguments
            runners.agree_on_one_more(call.get("server_args"))
            handle = runners.bind(self, args, kwargs)
            token = handle.enter()
            try:
                with runners.in_order(handle, "construction"), rooms.room("load", handle.name):
                    original(self, *args, **kwargs)
                runners.hold_experts(handle)
            except BaseException:
                runners.give_up(handle)
                raise
            finally:
                runners.leave(token)

    return __init__


CHANGES = (AroundMethods(MODULE, "ModelRunner", make=_method, make_init=_init),)
