"""sglang.srt.utils.patch_torch: torch is patched once, even if two runners update weights at once.

0.5.23 checks whether torch is patched, keeps the present `reduce_tensor` and replaces it. Two
threads at once would keep SGLang's own function, which calls the kept one: an endless recursion.
That function is for tensors on a GPU. In a process of its own a scheduler pickles no other; here
the same process pickles the tensors that an engine is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard.patching import Around
from sglang_distguard.sync.single_flight import run_once

MODULE = "sglang.srt.utils.patch_torch"
#: Registry key.
REDUCTIONS = "reductions"
_REPLACED = ("reduce_tensor", "rebuild_cuda_tensor")


def _patch_once(original: Callable[[], None]) -> Callable[[], None]:
    namespace = original.__globals__

    def observe() -> Optional[int]:
        now = [getattr(namespace["reductions"], name) for name in _REPLACED]
        is_patched = all(it.__module__ == MODULE for it in now)
        return id(now[0]) if is_patched else None

    def undo() -> None:
        reductions = namespace["reductions"]
        for name in _REPLACED:
            if hasattr(reductions, kept := f"_{name}_original"):
                setattr(reductions, name, getattr(reductions, kept))
                delattr(reductions, kept)

    @functools.wraps(original)
    def monkey_patch_torch_reductions() -> None:
        if observe() is None:
            run_once(
                REDUCTIONS,
                {},
                observe=observe,
                initialise=original,
                adopt=lambda: (None, {}),
                join=lambda _joined: None,
                undo=undo,
            )

    return monkey_patch_torch_reductions


def _reduce_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    namespace = original.__globals__

    @functools.wraps(original)
    def reduce_tensor(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "cpu":
            return namespace["reductions"]._reduce_tensor_original(tensor, *args, **kwargs)
        return original(tensor, *args, **kwargs)

    return reduce_tensor


CHANGES = (
    Around(MODULE, "monkey_patch_torch_reductions", _patch_once, uses=("reductions",)),
    Around(MODULE, "_reduce_tensor_modified", _reduce_tensor, uses=("reductions",)),
)
