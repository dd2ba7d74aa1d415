"""torch.profiler: one profile at a time in a process, as torch has one profiler (2.14.1).

In processes of their own SGLang's schedulers record independently. In threads of one process a
second `start` cancels the first recording, and the first `stop` crashes the process (libkineto).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.patching import Around
from sglang_distguard.sync.single_flight import run_once

_MODULE = "torch.profiler.profiler"
#: Registry key; its resource is the profile that records, and the thread that has started it.
PROFILER = "profiler"
#: What `observe` and the registry compare; there is one profiler.
_IDENTITY = 1


def _observe() -> Optional[int]:
    from torch.autograd import profiler

    running, _thread = _core.resource(PROFILER) or (None, 0)
    # Between `start` and the first step of a schedule torch does not record yet.
    return _IDENTITY if running is not None or profiler._is_profiler_enabled else None


def _who() -> str:
    execution = _core.current_execution()
    runner = None if execution is None else execution.runner
    return f"thread {threading.current_thread().name}" if runner is None else runner.name


def _start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: Any) -> None:
        def initialise() -> tuple[Any, int]:
            original(self)
            return self, threading.get_ident()

        run_once(
            PROFILER,
            # No two are equal, so that a second one is refused and not joined.
            {"profile": f"{id(self):#x} of {_who()}"},
            observe=_observe,
            initialise=initialise,
            adopt=lambda: ((None, 0), {"profile": "of code that had started it before"}),
            join=lambda _joined: None,
            undo=lambda: None,
        )

    return start


def _stop(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def stop(self: Any) -> None:
        try:
            original(self)
        finally:
            running, _thread = _core.resource(PROFILER) or (None, 0)
            if running is self:
                _core.forget(PROFILER)

    return stop


def stop_here() -> None:
    """Stop a profile that the calling thread has started; torch records and stops by thread."""
    running, thread = _core.resource(PROFILER) or (None, 0)
    if running is not None and thread == threading.get_ident():
        running.stop()


CHANGES = (
    Around(_MODULE, "profile.start", _start),
    Around(_MODULE, "profile.stop", _stop),
)
