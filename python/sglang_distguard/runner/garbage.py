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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_distguard.config.frozen import is_anything_frozen

#: Bytes on a GPU that need no collection: workspaces of cuBLAS, which torch keeps for each thread.
_SMALL = 256 << 20


class Loads:
    """The loads that are under way in this process, and whether objects are set aside for them.

    What other code has set aside stays so: nothing is set aside then, and nothing taken back. Where
    SGLang's captures or other code take everything back meanwhile, the collections that follow take
    longer, and nothing else changes.
    """

    def __init__(self) -> None:
        #: Loads, and those of them that have set objects aside. There is no lock, which an interrupt
        #: could leave held: each line is one step under the interpreter's lock, ``_end`` may be
        #: repeated, and what threads at once do in any order makes a collection longer at most.
        self._under_way: set[object] = set()
        self._set_aside: set[object] = set()

    def start_afresh(self) -> None:
        """Forget the loads of the parent in a forked child, and take its objects back."""
        self._under_way.clear()
        self._end(None)

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Set aside what exists; at the end of the with block collect what was made in it."""
        load = object()
        try:
            try:
                self._under_way.add(load)
                if not is_anything_frozen():
                    self._set_aside.add(load)
                    gc.freeze()
                yield
                gc.collect()
            finally:
                self._end(load)
        finally:  # an interrupt may have come before, or in, the first
            self._end(load)

    def _end(self, load: object) -> None:
        self._under_way.discard(load)
        if self._set_aside and not self._under_way:
            # A load that begins now sets aside after this takes back, so that it is not among them.
            ended = tuple(self._set_aside)
            gc.unfreeze()
            self._set_aside.difference_update(ended)


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
