"""Which of the lines ran that write process-globals: what is put back within a phase is not seen to change."""

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
    """Notes which writes of SGLang's ran.

    ``sys.settrace`` asks once per call, and by line only in functions that write something global.
    """

    def __init__(self) -> None:
        self._ran: set[Place] = set()
        # By identity: equal functions of two modules have equal code, and comparing code is slow.
        self._tracers: dict[int, tuple[types.CodeType, Optional[_Tracer]]] = {}

    def take(self) -> list[Place]:
        """What ran since the last call of this."""
        taken = set()
        while self._ran:  # one by one: other threads may add some meanwhile
            taken.add(self._ran.pop())
        return sorted(taken)

    def call(self, frame: types.FrameType, event: str, argument: Any) -> Optional[_Tracer]:
        """What ``sys.settrace`` is given."""
        code = frame.f_code
        known = self._tracers.get(id(code))
        if known is None:
            # With the code itself, so that no later one gets its number.
            known = code, self._tracer(code, frame.f_globals.get("__name__"))
            self._tracers[id(code)] = known
        return known[1]

    def _tracer(self, code: types.CodeType, module: Any) -> Optional[_Tracer]:
        if not isinstance(module, str) or not module.startswith("sglang."):
            return None
        if not code.co_filename.endswith(".py"):
            return None
        lines = {line for _, _, line in code.co_lines() if line is not None}
        lines &= {write.line for write in source_of(module, code.co_filename).writes}
        if not lines or code.co_name == "<module>":
            return None

        def trace(frame: types.FrameType, event: str, argument: Any) -> _Tracer:
            if event == "line" and frame.f_lineno in lines:
                self._ran.add((module, frame.f_lineno))
            return trace

        return trace


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Have ``trace`` note what this thread runs inside the with block, and threads that start in it."""
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
    """Let this thread run the with block without being asked about every call."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(before)
