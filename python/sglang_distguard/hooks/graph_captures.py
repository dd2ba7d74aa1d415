"""Every capture of a graph runs alone, including captures outside of the runner's methods.

Draft workers capture graphs of their own after their runner has captured (0.5.23:
`init_cuda_graphs` of `speculative/*_worker_v2.py`). Some graphs are captured in the middle of a
forward: vision encoders, buckets of rows. All captures go through a graph runner's `capture`, which
draft runners inherit, or through one of the context managers below. Most go through several. A
thread that is already in the capture phase enters it again at once.

`model_capture_mode` is not the place to enter the phase: prefill graphs are captured without it,
and a CPU graph of an encoder-decoder is replayed in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

from sglang_distguard.patching import Around
from sglang_distguard.runner.captures import capture_alone
from sglang_distguard.runner.collective_steps import step_among_ranks
from sglang_distguard.runner.handle import find_handle

#: Attribute of a context manager, while it is entered: the stack that ends its visit.
_VISIT = "_sglang_distguard_visit"


def _capture(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def capture(self: Any) -> Any:
        handle = find_handle(self.model_runner)
        if handle is None:
            return original(self)
        with step_among_ranks(handle, "capture", "capture", is_collective=True):
            return original(self)

    return capture


def _graph_capture(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def graph_capture(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with capture_alone():
            yield from original(*args, **kwargs)

    return graph_capture


def _enter(error_mode: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def __enter__(self: Any) -> Any:
            # "thread_local" means that other threads may use CUDA during the capture.
            if getattr(self, error_mode) != "global":
                return original(self)
            with ExitStack() as stack:
                stack.enter_context(capture_alone())
                entered = original(self)
                setattr(self, _VISIT, stack.pop_all())
            return entered

        return __enter__

    return make


def _exit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __exit__(self: Any, *args: Any) -> Any:
        with vars(self).pop(_VISIT, nullcontext()):
            return original(self, *args)

    return __exit__


_EXECUTOR = "sglang.srt.model_executor"
_BREAKABLE = f"{_EXECUTOR}.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph"

CHANGES = (
    Around(f"{_EXECUTOR}.cpu_graph_runner", "CPUGraphRunner.capture", _capture),
    Around(
        f"{_EXECUTOR}.runner.decode_cuda_graph_runner", "DecodeCudaGraphRunner.capture", _capture
    ),
    Around(
        f"{_EXECUTOR}.runner.prefill_cuda_graph_runner", "PrefillCudaGraphRunner.capture", _capture
    ),
    Around("sglang.srt.distributed.parallel_state", "graph_capture", _graph_capture),
    Around(
        _BREAKABLE,
        "BreakableCUDAGraphCapture.__enter__",
        _enter("_capture_error_mode"),
        uses=("BreakableCUDAGraphCapture.__exit__",),
    ),
    Around(_BREAKABLE, "BreakableCUDAGraphCapture.__exit__", _exit),
    Around(
        "torch.cuda.graphs",
        "graph.__enter__",
        _enter("capture_error_mode"),
        uses=("graph.__exit__",),
    ),
    Around("torch.cuda.graphs", "graph.__exit__", _exit),
)
