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

from sglang_distguard.distributed.ranks.log import PREFIX

_current: ContextVar[Optional[Creation]] = ContextVar("sglang_distguard.creation", default=None)
#: Seconds that a rank sleeps in the store without looking whether another one failed, or at signals.
_SLICE = 0.5
#: How a meeting ends.
_TOGETHER, _FAILED = "together", "failed"


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
        meeting = _Meeting.next(f"{PREFIX}/meet/{group_name}", store)
        why = "another rank failed before it created"
        try:
            meeting.come(size)
            deadline = time.monotonic() + self.seconds
            while not meeting.wait(min(_SLICE, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    why = f"timed out after {self.seconds:.1f} s waiting for the other members of"
                    meeting.decide(_FAILED)
                elif self._has_failed():
                    meeting.decide(_FAILED)
        except BaseException:  # interrupted, say
            with suppress(Exception):  # without a store nobody can be told
                meeting.decide(_FAILED)
            raise
        if meeting.outcome() == _FAILED or self._has_failed():
            raise NotTogether(f"{why} group {group_name}")

    def fail(self) -> None:
        """Let nobody wait for this rank."""
        if self.store is not None:
            with suppress(Exception):  # then they wait until the deadline
                self.store.set(f"{self.prefix}failed", "1")

    def _has_failed(self) -> bool:
        return self.store is not None and self.store.check([f"{self.prefix}failed"])


@dataclass(frozen=True)
class _Meeting:
    """One attempt of the members of a group to come together: the first decision counts for all."""

    key: str
    store: Any

    @classmethod
    def next(cls, key: str, store: Any) -> _Meeting:
        """The first that is not decided: a store may outlive what met there, or failed to."""
        for number in itertools.count():
            meeting = cls(f"{key}/{number}", store)
            if not store.check([meeting._outcome]):
                return meeting
        raise AssertionError

    @property
    def _outcome(self) -> str:
        return f"{self.key}/outcome"

    def come(self, size: int) -> None:
        if self.store.add(self.key, 1) == size:
            self.decide(_TOGETHER)

    def decide(self, outcome: str) -> None:
        self.store.compare_set(self._outcome, "", outcome)

    def outcome(self) -> str:
        return self.store.get(self._outcome).decode()

    def wait(self, seconds: float) -> bool:
        """Whether it was decided within ``seconds``."""
        import torch.distributed as dist

        try:
            self.store.wait([self._outcome], timedelta(seconds=max(seconds, 0.001)))
        except dist.DistStoreError:
            return bool(self.store.check([self._outcome]))
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
