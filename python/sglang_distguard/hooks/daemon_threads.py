"""Threads that SGLang starts for one manager and never ends end with it where a program hosts it.

They loop around `time.sleep` (0.5.23), which raises in them once their manager has ended.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Optional

from sglang_distguard.hooks.host import WATCHDOG, running_manager, seen
from sglang_distguard.patching import Around, Replace

_CPU = "sglang.srt.observability.cpu_monitor"
#: Ends the thread that is running.
_stop: ContextVar[Optional[threading.Event]] = ContextVar("sglang_distguard.stop", default=None)


class _Stopped(BaseException):
    """Ends a thread of a manager."""


def _sleep(seconds: float) -> None:
    stop = _stop.get()
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise _Stopped


def _ends_with_manager() -> threading.Event:
    stop = threading.Event()
    manager = running_manager()
    if manager is not None:
        manager.keep_part(stop.set)
    return stop


def _run_until(stop: threading.Event, run: Callable[[], None]) -> None:
    token = _stop.set(stop)
    try:
        run()
    except _Stopped:
        pass
    finally:
        _stop.reset(token)


def _watchdog_init(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._sglang_distguard_stop = _ends_with_manager()
        original(self, *args, **kwargs)

    return __init__


def _watchdog_thread(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the thread end with its manager, to which it refers."""

    @functools.wraps(original)
    def watchdog_thread(self: Any) -> None:
        _run_until(self._sglang_distguard_stop, functools.partial(original, self))

    return watchdog_thread


class _MonitorThread(threading.Thread):
    """The thread that counts the processor time of a manager's process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ends = _ends_with_manager()

    def run(self) -> None:
        _run_until(self._ends, super().run)


CHANGES = (
    Replace(WATCHDOG, "time", seen(sleep=_sleep)),
    Around(WATCHDOG, "WatchdogRaw.__init__", _watchdog_init),
    Around(WATCHDOG, "WatchdogRaw._watchdog_thread", _watchdog_thread),
    Replace(_CPU, "time", seen(sleep=_sleep)),
    Replace(_CPU, "threading", seen(Thread=_MonitorThread)),
)
