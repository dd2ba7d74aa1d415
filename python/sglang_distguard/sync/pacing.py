"""Lets what computes go on while an engine starts: the start pauses again and again.

A thread that computes gives the interpreter's lock up at each operation of torch. It gets it back when
the thread that starts an engine waits for something itself, or after the interpreter's switch interval.
So an answer takes ten times as long while engines start one after the other, with any switch interval
(measured; docs/engine-numbers.md). A start that pauses leaves whole steps to the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Optional

#: A pause is so many times as long as what was computed since the last one, which leaves the others
#: six sevenths of the interpreter; and at most so long, in seconds.
_TIMES, _LONGEST = 6.0, 0.05
#: Less than this is not worth a pause, in seconds of the thread's processor time.
_WORTH = 0.001
#: Whose start the code belongs to. A task that the start has made, and that lives on, keeps it.
_current: ContextVar[Optional[Pace]] = ContextVar("sglang_distguard.pace", default=None)


class Pace:
    """The pauses of one start.

    Attributes:
        pauses: how many there were.
    """

    def __init__(self, is_disturbing: Callable[[], bool]) -> None:
        """Make the pace of a start that begins now.

        Args:
            is_disturbing: whether others compute, so that the start should pause; called often.
        """
        self.pauses = 0
        self._is_disturbing = is_disturbing
        self._is_over = False
        self._since = threading.local()

    def end(self) -> None:
        """The start is over; nothing pauses any more."""
        self._is_over = True

    def pause(self, longest: float) -> None:
        """Pause if the calling thread has computed for a while and others compute."""
        if self._is_over:
            return
        now = time.thread_time()
        used = now - getattr(self._since, "time", now)
        if 0 < used < _WORTH:
            return
        if used and self._is_disturbing():
            self.pauses += 1
            time.sleep(min(_TIMES * used, longest))
        self._since.time = now


@contextmanager
def starting(pace: Optional[Pace]) -> Iterator[None]:
    """Treat the code of a with block, and of tasks that it makes, as part of the start."""
    token = _current.set(pace)
    try:
        yield
    finally:
        _current.reset(token)


def pause(longest: float = _LONGEST) -> None:
    """Pause if this code belongs to a start, and that disturbs others.

    Args:
        longest: seconds. Of code that does not hold the interpreter's lock all the time, as copies of
            weights do not, the time that it has computed says too much.
    """
    pace = _current.get()
    if pace is not None:
        pace.pause(longest)
