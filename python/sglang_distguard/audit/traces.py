"""Records which lines that write process-globals ran.

A value that is restored within a phase does not show as a change.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from sglang_distguard.audit.sources import source_of

#: (module, line)
Place = tuple[str, int]
_Tracer = Callable[[types.FrameType, str, Any], Any]


class Trace:
    """Records which of SGLang's writes ran.

    ``sys.settrace`` calls it once per function call, and per line only in functions that write a
    global.
    """

    def __init__(self) -> None:
        self._ran: set[Place] = set()
        #: Called on the main thread, untraced, where a line is about to run that may restore a
        #: value (``Source.moments``); once for each such line.
        self.before_restoring: Optional[Callable[[], None]] = None
        self._restored: set[Place] = set()
        # Keyed by identity: equal functions of two modules have equal code, and comparing is slow.
        self._tracers: dict[int, tuple[types.CodeType, Optional[_Tracer]]] = {}

    def take(self) -> list[Place]:
        """Return the places that ran since the last call of this method."""
        taken = set()
        while self._ran:  # one by one: other threads may add some meanwhile
            taken.add(self._ran.pop())
        return sorted(taken)

    def call(self, frame: types.FrameType, event: str, argument: Any) -> Optional[_Tracer]:
        """The trace function that ``sys.settrace`` gets."""
        code = frame.f_code
        known = self._tracers.get(id(code))
        if known is None:
            # Keep the code object, so that no later one gets the same id.
            known = code, self._tracer(code, frame.f_globals.get("__name__"))
            self._tracers[id(code)] = known
        return known[1]

    def _tracer(self, code: types.CodeType, module: Any) -> Optional[_Tracer]:
        if not isinstance(module, str) or not module.startswith("sglang."):
            return None
        if not code.co_filename.endswith(".py"):
            return None
        lines = {line for _, _, line in code.co_lines() if line is not None}
        source = source_of(module, code.co_filename)
        writes = lines & {write.line for write in source.writes}
        moments = lines & source.moments if self.before_restoring is not None else set[int]()
        if not (writes or moments) or code.co_name == "<module>":
            return None

        def trace(frame: types.FrameType, event: str, argument: Any) -> _Tracer:
            if event == "line":
                if frame.f_lineno in writes:
                    self._ran.add((module, frame.f_lineno))
                if frame.f_lineno in moments:
                    self._will_restore((module, frame.f_lineno))
            return trace

        return trace

    def _will_restore(self, place: Place) -> None:
        if place in self._restored or threading.current_thread() is not threading.main_thread():
            return
        self._restored.add(place)
        if self.before_restoring is not None:
            with untraced():
                self.before_restoring()


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Let ``trace`` record this thread, and threads that start meanwhile, in the with block."""
    before, before_in_threads = sys.gettrace(), threading.gettrace()
    threading.settrace(trace.call)
    sys.settrace(trace.call)
    try:
        yield
    finally:
        sys.settrace(before)
        threading.settrace(before_in_threads)  # type: ignore[arg-type]


@contextmanager
def untraced() -> Iterator[None]:
    """Run the with block on this thread without tracing every call."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(before)
