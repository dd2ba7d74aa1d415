"""Names and deadlines of the process groups that are created in a turn.

torch names a group by the number of groups created before (2.14.1, `_process_group_name`). After a
creation that fails on one rank only, the members of later groups would not find each other. In a
turn, the name of a group follows from what the ranks agreed on.

A rank that creates a group waits for the others for the group's own timeout, 30 minutes by default.
It cannot be shortened for the creation alone, because gloo uses it for all later receives too. So
the members of a group meet at a key of the store before they create it, and wait there only until
the deadline.

SGLang makes most groups of a layout that it does not use with one member each (0.5.23: two for each
coordinator). Nothing is ever sent in them, so those that are equal are one group
(``Creation.sharing_lone``). Groups of several members stay apart: two threads, or two streams, may
use two groups of the same ranks at once.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Optional
from weakref import WeakSet

from sglang_distguard.distributed.ranks.log import PREFIX

_current: ContextVar[Optional[Creation]] = ContextVar("sglang_distguard.creation", default=None)
#: Seconds that a rank sleeps in the store between checks for failed ranks and for signals.
_SLICE = 0.5
#: Outcomes of a meeting.
_TOGETHER, _FAILED = "together", "failed"

#: Process groups that several coordinators have: the first of these to be destroyed destroys them.
_lone: WeakSet[Any] = WeakSet()


class NotTogether(TimeoutError):
    """Other members of a process group did not arrive to create it."""


@dataclass
class Creation:
    """Names and deadline for process groups that the running thread creates.

    Attributes:
        seconds: how long the members of a group wait for each other.
        prefix: prefix of the name of every group that is created; None leaves names to torch.
        store: where a rank records that its creation failed; None before a store exists.
        is_over: whether the with block has ended; a context copied inside may outlive it.
    """

    seconds: float
    prefix: Optional[str]
    store: Any
    is_over: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _made: Optional[dict[Hashable, Any]] = None

    def next_name(self) -> Optional[str]:
        """Return the name of the next group, equal on all ranks; None leaves it to torch."""
        return None if self.prefix is None else f"{self.prefix}{next(self._numbers)}"

    def limit(self, timeout: Optional[timedelta]) -> timedelta:
        """Return ``timeout``, or ``seconds`` if that is less."""
        limit = timedelta(seconds=min(self.seconds, timedelta.max.total_seconds() / 2))
        return limit if timeout is None else min(limit, timeout)

    def names(self, group_name: str) -> bool:
        """Whether ``group_name`` is a name that the ranks agreed on."""
        return self.prefix is not None and str(group_name).startswith(self.prefix)

    @contextmanager
    def sharing_lone(self) -> Iterator[None]:
        """Make equal groups of one member once inside the with block.

        All coordinators that are made inside must be destroyed together.
        """
        self._made = {}
        try:
            yield
        finally:
            self._made = None

    def lone(self, key: Hashable, make: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return the group of one member that ``make`` makes, or made before for an equal ``key``.

        Args:
            key: what groups must agree on to be one.
            make: returns the group and its store.
        """
        if self._made is None:
            return make()
        made = self._made.get(key)
        if made is None:
            self._made[key] = made = make()
        else:
            _lone.add(made[0])
        return made

    def meet(self, group_name: str, size: int, store: Any) -> None:
        """Wait until all ``size`` members are about to create the group.

        Args:
            group_name: equal on all members.
            size: number of members.
            store: store that the members share.

        Raises:
            NotTogether: a member did not arrive within ``seconds``, or another rank has failed.
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
        except BaseException:  # an interrupt, for example
            with suppress(Exception):  # without a store no rank can be told
                meeting.decide(_FAILED)
            raise
        if meeting.outcome() == _FAILED or self._has_failed():
            raise NotTogether(f"{why} group {group_name}")

    def fail(self) -> None:
        """Record that this rank failed, so that no other rank waits for it."""
        if self.store is not None:
            with suppress(Exception):  # without it they wait until the deadline
                self.store.set(f"{self.prefix}failed", "1")

    def _has_failed(self) -> bool:
        return self.store is not None and self.store.check([f"{self.prefix}failed"])


@dataclass(frozen=True)
class _Meeting:
    """One attempt of the members of a group to meet; the first decision counts for all."""

    key: str
    store: Any

    @classmethod
    def next(cls, key: str, store: Any) -> _Meeting:
        """Return the first undecided meeting: the store may still have outcomes of earlier ones."""
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
        """Wait up to ``seconds`` for the decision; return whether there is one."""
        import torch.distributed as dist

        try:
            self.store.wait([self._outcome], timedelta(seconds=max(seconds, 0.001)))
        except dist.DistStoreError:
            return bool(self.store.check([self._outcome]))
        return True


def is_lone(process_group: Any) -> bool:
    """Whether several coordinators have ``process_group``, which has one member."""
    return process_group in _lone


def current() -> Optional[Creation]:
    """Return the creation that the running thread is in; None outside of ``creating``."""
    creation = _current.get()
    return None if creation is None or creation.is_over else creation


@contextmanager
def creating(seconds: float, prefix: Optional[str] = None, store: Any = None) -> Iterator[Creation]:
    """Set names and deadline of process groups that are created inside the with block.

    Args:
        seconds: how long the members of one group wait for each other.
        prefix: prefix of the groups' names; None leaves names to torch.
        store: where the ranks tell each other of failures, if there is one.
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
