"""sglang.srt.model_executor.model_runner: a runner's methods run in its own scope, on any thread."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import runners
from sglang_distguard.patching import AroundMethods

MODULE = "sglang.srt.model_executor.model_runner"


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _one_thread_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward writes the runner's attention metadata and static buffers (0.5.23)."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        handle.begin_forward()
        try:
            return original(self, *args, **kwargs)
        finally:
            handle.end_forward()

    return forward


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if runners.find_handle(self) is not None:  # a subclass calling up
            original(self, *args, **kwargs)
            return
        handle = runners.bind(self, args, kwargs)
        token = handle.enter()
        try:
            original(self, *args, **kwargs)
            runners.hold_experts(handle)
        except BaseException:
            handle.close()
            raise
        finally:
            runners.leave(token)

    return __init__


CHANGES = (AroundMethods(MODULE, "ModelRunner", make=_method, make_init=_init),)
