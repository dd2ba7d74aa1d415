"""sglang.srt.utils.common: what a runner that is being sized reads as free memory of its device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.patching import Around
from sglang_distguard.runner.budget import free_for_runner
from sglang_distguard.sync.pacing import pause


def _get_available_gpu_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_available_gpu_memory(
        device: Any,
        gpu_id: int,
        distributed: bool = False,
        empty_cache: bool = True,
        cpu_group: Any = None,
    ) -> float:
        def read() -> float:
            pause()
            free: float = original(device, gpu_id, False, empty_cache)
            return free

        def reduce(free: float) -> float:
            return _least(free, cpu_group) if distributed else free

        return free_for_runner(read, device, gpu_id, reduce)

    return get_available_gpu_memory


def _least(free: float, group: Any) -> float:
    """As SGLang does for several ranks (0.5.23)."""
    import torch

    tensor = torch.tensor(free, dtype=torch.float32)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN, group=group)
    return float(tensor.item())


CHANGES = (
    Around("sglang.srt.utils.common", "get_available_gpu_memory", _get_available_gpu_memory),
)
