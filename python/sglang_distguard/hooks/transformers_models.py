"""sglang.srt.models.transformers: only the building thread moves parameters to the device."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_distguard.context.register_parameter import thread_register_parameter
from sglang_distguard.patching import Around

MODULE = "sglang.srt.models.transformers"


def _init_on_device_without_buffers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace ``nn.Module.register_parameter`` on the calling thread only.

    SGLang replaces it in the whole process for a with block (0.5.23). Parameters that another
    thread registers meanwhile are made again, with arguments that they do not take. Of two such
    blocks, the one that ends last leaves the other's function in place permanently. Here SGLang's
    own code runs with a stand-in for ``nn``. The function that it sets there applies to the calling
    thread.
    """

    @functools.wraps(original)
    def init_on_device_without_buffers(*args: Any, **kwargs: Any) -> Iterator[None]:
        namespace = original.__globals__
        module = types.SimpleNamespace(register_parameter=namespace["nn"].Module.register_parameter)
        stand_in = types.SimpleNamespace(Module=module)
        own = types.FunctionType(original.__code__, {**namespace, "nn": stand_in})
        with (
            contextmanager(own)(*args, **kwargs),
            thread_register_parameter(module.register_parameter),
        ):
            yield

    return init_on_device_without_buffers


CHANGES = (
    Around(
        MODULE, "_init_on_device_without_buffers", _init_on_device_without_buffers, uses=("nn",)
    ),
)
