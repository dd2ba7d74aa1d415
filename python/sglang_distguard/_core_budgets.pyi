"""The part of `_core` that is about memory (rust/src/budgets.rs); no module of its own."""

from typing import final

from sglang_distguard._core import RunnerHandle

@final
class Standing:
    """What a runner may count on of its device's memory, in bytes (rust/core/src/budgets.rs)."""

    @property
    def room(self) -> int: ...
    @property
    def promised(self) -> int: ...
    @property
    def taken_beside(self) -> int:
        """What its drafts or its target take, if one promise pays for all."""

    @property
    def others(self) -> int:
        """What other runners were promised, or take."""

    @property
    def by_count(self) -> bool:
        """Whether what it takes is counted, and not measured: it has neighbours, or ``memory=``."""

def open_budget(handle: RunnerHandle, device: str) -> int | None:
    """Note that a runner comes to ``device``; return its room, None if that must be measured."""

def measured_room(device: str, free: int) -> int:
    """Note what ``device`` has free, unless that is known; return its room."""

def promise_memory(
    handle: RunnerHandle, asked: int, *, free: int | None = None, room: int | None = None
) -> tuple[int, int, list[tuple[str, int]]] | None:
    """Have ``asked`` bytes promised to a runner.

    ``free`` is what its device would have free without this process's tensors, and ``room`` what it
    shall seem to have. Returns None, or if it is refused: the room, what is left of it, and the
    other runners with what each was promised.
    """

def count_memory(handle: RunnerHandle, taken: int, *, sized: bool = False) -> None:
    """Note what a runner's tensors take, and whether it has its pool."""

def end_budget(handle: RunnerHandle) -> None:
    """Take back what was promised to a runner whose memory has been freed.

    Its handle's destructor does the same: of a runner that is closed by force, or by its manager.
    """

def standing_of(handle: RunnerHandle) -> Standing | None:
    """Return what a runner may count on; None before its device was measured."""

def promised_memory(device: str) -> list[tuple[str, int]]:
    """Return the runners on ``device``, and what each was promised or takes, oldest first."""
