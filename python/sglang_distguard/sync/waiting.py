"""The one loop in which threads wait for each other: deadline, Ctrl-C, the interpreter's exit."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any, Optional, Protocol, TypeVar

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.errors import DistGuardError
from sglang_distguard.sync import event_log

#: Seconds that the main thread sleeps without handling signals: the longest delay of Ctrl-C. Python
#: runs signal handlers in that thread only, so other threads sleep until something changes.
SLICE = 0.02

Result = TypeVar("Result")


class Waits(Protocol):
    """An object that sleeps between attempts, such as a `_core.Request` or a `_core.Visit`.

    Attributes:
        patience: seconds after which another attempt is necessary even if nothing has changed.
    """

    @property
    def patience(self) -> float: ...

    def wait(self, seconds: float) -> None:
        """Sleep, detached from the interpreter, until something changed or for ``seconds``."""
        ...

    def timed_out(self) -> Exception:
        """Return the error to raise at the deadline."""
        ...


def until(
    attempt: Callable[[], Optional[Result]], waits: Waits, *, timeout: float, what: str
) -> Result:
    """Repeat ``attempt`` until it returns a value other than None, and return that value.

    Args:
        attempt: one attempt; an exception from it ends the wait.
        waits: sleeps between attempts.
        timeout: seconds; ``math.inf`` for no deadline.
        what: name of what the caller waits for, for messages.

    Raises:
        AcquireTimeout (from ``waits.timed_out``): ``timeout`` seconds have passed.
        DistGuardError: the interpreter is exiting and waits for this thread.
        Whatever a signal handler raises (KeyboardInterrupt), within two slices plus the time that
        the GIL takes.
    """
    deadline = time.monotonic() + timeout
    longest = min(max(waits.patience, SLICE), _longest_sleep())
    while True:
        result = attempt()
        event_log.report()
        if result is not None:
            return result
        left = deadline - time.monotonic()
        if left <= 0:
            error = waits.timed_out()
            event_log.report()
            raise error
        if _is_exiting():
            raise DistGuardError(f"stopped waiting for {what}: the interpreter is exiting")
        waits.wait(min(longest, left))


def to_enter(visit: _core.Visit, what: str, timeout: Optional[float] = None) -> None:
    """Wait until ``visit`` has entered its phase; native code calls this too (rust/src/step.rs).

    Args:
        visit: visit to a phase that has not entered yet.
        what: name of the phase, for messages.
        timeout: seconds; default: the setting in force.

    Raises:
        AcquireTimeout: ``timeout`` seconds have passed.
        DeadlockError: the wait would never end.
    """
    seconds = settings.current().timeout if timeout is None else timeout
    until(lambda: visit.try_enter() or None, visit, timeout=seconds, what=what)


def _longest_sleep() -> float:
    if threading.get_ident() == threading.main_thread().ident:
        return SLICE
    return math.inf if WAKES_AT_EXIT else SLICE


def _wake_at_exit() -> bool:
    """Let the interpreter's exit wake all waiting threads before it joins them.

    This uses the hook of `concurrent.futures` (`threading._register_atexit`, CPython 3.9 to 3.14).
    The exit calls the last registered function first. That of `concurrent.futures`, which joins the
    threads of executors, must therefore be registered before this one.

    Returns:
        Whether it was registered; otherwise every thread has to check for the exit itself.
    """
    import concurrent.futures.thread  # noqa: F401

    register: Any = getattr(threading, "_register_atexit", None)
    try:
        register(_core.wake_all)
    except (TypeError, RuntimeError):  # no such hook, or the interpreter is exiting
        return False
    return True


#: Whether threads may sleep until something changes.
WAKES_AT_EXIT = _wake_at_exit()


def _is_exiting() -> bool:
    """Whether the interpreter is exiting and waits for this thread to end.

    `threading._shutdown` (CPython 3.11 to 3.14) sets the flag before it joins the threads of
    executors. Without the flag, the end of the main thread shows the exit. The interpreter does not
    wait for daemon threads; they stop where they are (rust/src/exit.rs).
    """
    if threading.current_thread().daemon:
        return False
    return getattr(threading, "_SHUTTING_DOWN", False) or not threading.main_thread().is_alive()
