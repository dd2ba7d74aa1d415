"""Names and deadlines of the process groups that are created in a turn.

torch names a group by counting those created before, so that one creation that fails on one rank makes
every later one meet nobody (2.14.1, `_process_group_name`); and it lets a rank that waits for the others
wait for the group's own timeout, 30 minutes by default. In a turn a group is named by what the ranks
agreed on, and is created within the agreement's deadline.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Optional

_current: ContextVar[Optional[Creation]] = ContextVar("sglang_distguard.creation", default=None)


@dataclass(frozen=True)
class Creation:
    """What is being created by the running thread.

    Attributes:
        prefix: begins the name of every group that is created; None leaves names to torch.
        deadline: on the monotonic clock.
    """

    prefix: Optional[str]
    deadline: float
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def next_name(self) -> Optional[str]:
        """The name of the next group, the same on every rank; None leaves it to torch."""
        return None if self.prefix is None else f"{self.prefix}{next(self._numbers)}"

    def limit(self, timeout: Optional[timedelta]) -> timedelta:
        """What is left until the deadline, or ``timeout`` if that is less."""
        left = timedelta(seconds=max(self.deadline - time.monotonic(), 0.001))
        return left if timeout is None else min(left, timeout)


def current() -> Optional[Creation]:
    """What the running thread creates."""
    return _current.get()


@contextmanager
def creating(seconds: float, prefix: Optional[str] = None) -> Iterator[Creation]:
    """Create process groups inside the with block within ``seconds``, named ``prefix`` and a number."""
    creation = Creation(prefix, time.monotonic() + min(seconds, timedelta.max.total_seconds() / 2))
    token = _current.set(creation)
    try:
        yield creation
    finally:
        _current.reset(token)
