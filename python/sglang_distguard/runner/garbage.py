"""Garbage of a load, collected when the load ends without looking through all modules.

SGLang collects all garbage before it sizes the pools of a runner on a GPU (0.5.23,
`_profile_available_bytes`), because what loading leaves may hold memory of the GPU. A full collection
holds the interpreter's lock for 0.4 s (measured, CPython 3.12), in which no other build goes on, and
almost all that it looks through are modules. So what exists when a load begins is set aside until the
load ends (`gc.freeze`). The collection at its end sees what was made since, and the one before the
pools are sized only what is young. What was dropped earlier and holds memory of a GPU is collected
before the load begins, unless another load is under way, which has done so.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from sglang_distguard.config.frozen import is_anything_frozen
from sglang_distguard.config.overlapping import Overlapping

#: Bytes on a GPU that need no collection: workspaces of cuBLAS, which torch keeps for each thread.
_SMALL = 256 << 20


class Loads(Overlapping):
    """The loads that are under way in this process, while objects are set aside for them.

    What other code has set aside stays so. Where SGLang's captures or other code take everything
    back meanwhile, the collections that follow take longer, and nothing else changes. Each load ends
    with a collection of what was made in it.
    """

    def __init__(self) -> None:
        super().__init__(is_anything_frozen, gc.freeze, gc.unfreeze, at_end=gc.collect)


LOADS = Loads()


def collect_before_load(device: str, index: int) -> None:
    """Collect what was dropped earlier and may hold memory of the GPU onto which a load begins.

    Args:
        device, index: the device, as SGLang names it: "cuda", 0.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or device != "cuda" or LOADS:
        return
    if torch.cuda.is_initialized() and torch.cuda.memory_allocated(index) > _SMALL:
        gc.collect()


def collect_before_pools() -> int:
    """Collect what is young: the load has collected the rest. Returns what `gc.collect` does."""
    return gc.collect(1)
