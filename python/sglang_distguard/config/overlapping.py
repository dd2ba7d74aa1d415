"""A change of the process that lasts while any of several blocks runs, in whichever threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


def _nothing() -> None:
    return None


class Overlapping:
    """Blocks that may overlap, and those of them that have made the change.

    A change that other code has made before stays: nothing is made then, and nothing undone. If other code
    undoes it meanwhile, it stays undone until the next block begins.

    There is no lock, which an interrupt could leave held: each line is one step under the
    interpreter's lock, and ``_end`` may be repeated. What threads at once do in any order undoes the
    change early, at most.
    """

    def __init__(
        self,
        is_made: Callable[[], bool],
        make: Callable[[], object],
        undo: Callable[[], object],
        at_end: Callable[[], object] = _nothing,
    ) -> None:
        """Describe the change.

        Args:
            is_made: whether it is made now, by these blocks or by other code.
            make: makes it; called when a block begins and it is not made.
            undo: undoes it; called when the last block has ended. May be repeated.
            at_end: called at the end of each block that raises nothing.
        """
        self._is_made, self._make, self._undo, self._at_end = is_made, make, undo, at_end
        self._under_way: set[object] = set()
        self._have_made: set[object] = set()

    def start_afresh(self) -> None:
        """Forget the blocks of the parent's threads in a forked child, and undo the change."""
        self._under_way.clear()
        self._end(None)

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Keep the change made while the with block runs."""
        block = object()
        try:
            try:
                self._under_way.add(block)
                if not self._is_made():
                    self._have_made.add(block)
                    self._make()
                yield
                self._at_end()
            finally:
                self._end(block)
        finally:  # an interrupt may have come before, or in, the first
            self._end(block)

    def _end(self, block: object) -> None:
        self._under_way.discard(block)
        if self._have_made and not self._under_way:
            # A block that begins now makes the change after this undoes it, so that it is not among
            # them. An interrupt before the last line undoes it again.
            ended = tuple(self._have_made)
            self._undo()
            self._have_made.difference_update(ended)
