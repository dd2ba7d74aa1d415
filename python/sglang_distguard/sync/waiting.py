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

#: Seconds that the main thread sleeps without handling signals: what Ctrl-C may take at worst. Python
#: runs signal handlers in that thread only, so that the others sleep until something changes.
SLICE = 0.02

Result = TypeVar("Result")


class Waits(Protocol):
    """What is waited with: a `_core.Request` or a `_core.Visit`.

    Attributes:
        patience: seconds after which it must be looked at again, though nothing has changed.
    """

    @property
    def patience(self) -> float: ...

    def wait(self, seconds: float) -> None:
        """Sleep, detached from the interpreter, until something changed or for ``seconds``."""
        ...

    def timed_out(self) -> Exception:
        """The error of a caller that gives up."""
        ...


def until(
    attempt: Callable[[], Optional[Result]], waits: Waits, *, timeout: float, what: str
) -> Result:
    """Repeat ``attempt`` until it returns something else than None.

    Args:
        attempt: looks and asks; what it raises ends the wait.
        waits: sleeps between attempts.
        timeout: seconds; ``math.inf`` for no deadline.
        what: what is waited for, for messages.

    Raises:
        AcquireTimeout: ``timeout`` seconds have passed.
        DistGuardError: the interpreter is exiting; only in threads that it waits for.
        Whatever a signal handler raises (KeyboardInterrupt), within two slices and what the GIL takes.
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
            raise DistGuardError(f"gave up waiting for {what}: the interpreter is exiting")
        waits.wait(min(longest, left))


def to_enter(visit: _core.Visit, what: str, timeout: Optional[float] = None) -> None:
    """Wait until ``visit`` is inside of its phase; called from native code, too (rust/src/step.rs).

    Raises:
        AcquireTimeout: ``timeout`` seconds, or those of the settings in force, have passed.
        DeadlockError: waiting would never end.
    """
    seconds = settings.current().timeout if timeout is None else timeout
    until(lambda: visit.try_enter() or None, visit, timeout=seconds, what=what)


def _longest_sleep() -> float:
    if threading.get_ident() == threading.main_thread().ident:
        return SLICE
    return math.inf if WAKES_AT_EXIT else SLICE


def _wake_at_exit() -> bool:
    """Let the interpreter's exit wake whoever waits, before it joins their threads.

    By what `concurrent.futures` does it by (`threading._register_atexit`, CPython 3.9 to 3.14): in the
    order of registration, the last one first, so that theirs, which joins the threads of executors,
    has to be there before.

    Returns:
        Whether it can: otherwise every thread has to look for itself.
    """
    import concurrent.futures.thread  # noqa: F401

    register: Any = getattr(threading, "_register_atexit", None)
    try:
        register(_core.wake_all)
    except (TypeError, RuntimeError):  # there is none, or the interpreter is exiting already
        return False
    return True


#: Whether threads may sleep until something changes.
WAKES_AT_EXIT = _wake_at_exit()


def _is_exiting() -> bool:
    """Whether the interpreter waits for this thread to end, so that it may exit.

    `threading._shutdown` (CPython 3.11 to 3.14) sets the flag before it joins the threads of
    executors; without it we notice when the main thread is done. Daemon threads are not waited
    for: they stop where they are (rust/src/exit.rs).
    """
    if threading.current_thread().daemon:
        return False
    return getattr(threading, "_SHUTTING_DOWN", False) or not threading.main_thread().is_alive()
