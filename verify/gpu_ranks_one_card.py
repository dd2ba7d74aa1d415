"""Two ranks on one GPU, for measurements alone: NCCL refuses that, so no collective is computed.

Logits are then meaningless. What SGLang and the guard do around collectives stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: Functions of torch.distributed that would have NCCL make a communicator.
_OVER_NCCL = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")


def leave_out_collectives() -> None:
    """Let SGLang's and torch's collectives on GPUs return without having communicated (0.5.23)."""
    import torch.distributed as dist
    from sglang.srt.distributed import parallel_state
    from sglang.srt.distributed.device_communicators import pynccl

    for name in _OVER_NCCL:
        setattr(dist, name, _on_cpu_only(getattr(dist, name)))

    def make(self: Any, group: Any, device: Any, *args: Any, **options: Any) -> None:
        self.group, self.device = group, device
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.available, self.disabled = False, True

    def gather(self: Any, output: Any, given: Any) -> None:
        shape = (self.world_size, *given.shape)
        output.view(shape).copy_(given.expand(shape))

    replaced: Any = parallel_state.GroupCoordinator
    replaced._all_reduce_in_place = lambda self, given: None
    replaced.all_gather_into_tensor = gather
    replaced = pynccl.PyNcclCommunicator
    replaced.__init__ = make


def _on_cpu_only(collective: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        import torch

        tensors = [it for it in (*args, *options.values()) if isinstance(it, torch.Tensor)]
        is_over_nccl = any(it.is_cuda for it in tensors) or (not tensors and not args)
        return None if is_over_nccl else collective(*args, **options)

    return run
