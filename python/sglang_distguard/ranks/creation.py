"""Names and deadlines of the process groups that are created in a turn.

torch names a group by counting those created before, so that one creation that fails on one rank makes
every later one meet nobody (2.14.1, `_process_group_name`). In a turn a group is named by what the ranks
agreed on. And torch lets a rank that waits for the others wait for the group's own timeout, 30 minutes by
default. That cannot be shortened for the creation alone: gloo receives with it for ever after. So the
members of a group meet at a key of the store before they create it, and none waits there for longer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Optional

_current: ContextVar[Optional[Creation]] = ContextVar("sglang_distguard.creation", default=None)
#: Seconds that a rank sleeps in the store without looking whether another one failed, or at signals.
_SLICE = 0.5


class NotTogether(TimeoutError):
    """Other members of a group did not come to create it."""


@dataclass
class Creation:
    """What is being created by the running thread.

    Attributes:
        seconds: that the members of a group wait for each other.
        prefix: begins the name of every group that is created; None leaves names to torch.
        store: where ranks tell that theirs failed; None before there is one.
        is_over: whether the with block has ended; a context copied inside may outlive it.
    """

    seconds: float
    prefix: Optional[str]
    store: Any
    is_over: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def next_name(self) -> Optional[str]:
        """The name of the next group, the same on every rank; None leaves it to torch."""
        return None if self.prefix is None else f"{self.prefix}{next(self._numbers)}"

    def limit(self, timeout: Optional[timedelta]) -> timedelta:
        """``timeout``, or ``seconds`` if that is less."""
        limit = timedelta(seconds=min(self.seconds, timedelta.max.total_seconds() / 2))
        return limit if timeout is None else min(limit, timeout)

    def names(self, group_name: str) -> bool:
        """Whether a group of that name is one that the ranks agreed on."""
        return self.prefix is not None and str(group_name).startswith(self.prefix)

    def meet(self, group_name: str, size: int, store: Any) -> None:
        """Wait until all ``size`` members are about to create the group.

        Args:
            group_name: the same on all members.
            size: how many there are.
            store: which they share.

        Raises:
            NotTogether: they did not come within ``seconds``, or one has failed.
        """
        key = f"sglang_distguard/meet/{group_name}"
        if store.add(key, 1) == size:
            store.set(f"{key}/all", "1")
        deadline = time.monotonic() + self.seconds
        while not _wait(store, f"{key}/all", min(_SLICE, deadline - time.monotonic())):
            why = None
            if time.monotonic() >= deadline:
                why = f"timed out after {self.seconds:.1f} s waiting for the other members of"
            elif self._has_failed():
                why = "another rank failed before it created"
            if why is not None:
                store.add(key, -1)  # this rank may come again, to a group of that name
                raise NotTogether(f"{why} group {group_name}")

    def fail(self) -> None:
        """Let nobody wait for this rank."""
        if self.store is not None:
            with suppress(Exception):  # then they wait until the deadline
                self.store.set(f"{self.prefix}failed", "1")

    def _has_failed(self) -> bool:
        return self.store is not None and self.store.check([f"{self.prefix}failed"])


def _wait(store: Any, key: str, seconds: float) -> bool:
    import torch.distributed as dist

    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError:
        return bool(store.check([key]))
    return True


def current() -> Optional[Creation]:
    """What the running thread creates."""
    creation = _current.get()
    return None if creation is None or creation.is_over else creation


@contextmanager
def creating(seconds: float, prefix: Optional[str] = None, store: Any = None) -> Iterator[Creation]:
    """Create process groups inside the with block.

    Args:
        seconds: that the members of one group wait for each other.
        prefix: begins the groups' names.
        store: where the ranks tell each other of failures.
    """
    creation = Creation(seconds, prefix, store)
    token = _current.set(creation)
    try:
        yield creation
    except BaseException:
        creation.fail()
        raise
    finally:
        creation.is_over = True
        _current.reset(token)
