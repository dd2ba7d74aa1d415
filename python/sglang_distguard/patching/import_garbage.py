"""No garbage is collected while modules of SGLang are executed.

An import makes objects that stay, a million of them. Full collections look through all of them, again
and again: 3 of the 13 seconds in which a process imports SGLang 0.5.23 and starts an engine
(docs/engine-numbers.md). What other threads drop meanwhile is collected afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Imports:
    """The executions that are under way in this process, and those that have paused collecting.

    There is no lock, which an interrupt could leave held: each line is one step under the
    interpreter's lock, and ``_end`` may be repeated. What threads at once do in any order lets
    garbage be collected during an import, at most. A process that does not collect is left alone.
    """

    def __init__(self) -> None:
        self._under_way: set[object] = set()
        self._have_paused: set[object] = set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Pause collecting while the with block, which executes a module, runs."""
        execution = object()
        try:
            try:
                self._under_way.add(execution)
                if gc.isenabled():
                    self._have_paused.add(execution)
                    gc.disable()
                yield
            finally:
                self._end(execution)
        finally:  # an interrupt may have come before, or in, the first
            self._end(execution)

    def _end(self, execution: object) -> None:
        self._under_way.discard(execution)
        if self._have_paused and not self._under_way:
            # One that begins now finds collecting off, or on again: it does not stay off.
            self._have_paused.clear()
            gc.enable()

    def start_afresh(self) -> None:
        """Forget the imports of the parent's threads in a forked child."""
        self._under_way.clear()
        self._end(None)


IMPORTS = Imports()
