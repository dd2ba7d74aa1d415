"""The ranks of one world, and the log that all of them append to and read, in their world's store.

Every operation on the store counts: an ask, or the end of a turn or build, costs a rank two (``tell``)
and each entry of the log two more (``read``); the rank that tells last, a few to judge, write and tidy.
What is to wait for ranks has a deadline. The rest is answered by the store at once, or fails with its
connection; torch 2.14.1 neither limits nor interrupts that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Optional
from weakref import WeakKeyDictionary

from sglang_distguard import _core

#: In front of every key of ours, in a store that torch and others use too.
PREFIX = "sglang_distguard"
#: Seconds that a reader sleeps in the store at most; whoever gives up writes an entry, which wakes it.
READ = 600.0
#: Seconds that a connection waits for keys that should be there.
OPERATION = 30.0

#: By torch's default group: ranks that failed to agree on their world try again in the same log.
_opened: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()


@dataclass(frozen=True)
class Ranks:
    """A world of several ranks, as one of them sees it.

    Attributes:
        rank: this process's.
        size: how many there are.
        generation: number of the world among those that its ranks opened over one store.
        store: the world's store under a prefix and over a connection of our own.
        reading: one more connection: who sleeps in it must not keep others from asking.
        state: what was agreed on, as far as this process has read the log.
    """

    rank: int
    size: int
    generation: int
    store: Any
    reading: Any
    state: _core.Agreement = field(default_factory=_core.Agreement)

    def tell(self, key: str, report: Mapping[str, Any]) -> bool:
        """Add this rank's ``report`` under ``key``; True for the rank that is the last to do so."""
        _append(self.store, key, json.dumps({"rank": self.rank, **report}) + "\n")
        return self.store.add(f"{key}/told", 1) == self.size

    def told(self, key: str) -> dict[int, dict[str, Any]]:
        """What the ranks have told under ``key``, by rank; this one has."""
        if not self.store.check([key]):
            return {}
        lines = self.store.get(key).decode().splitlines()
        reports = [json.loads(line) for line in lines]
        return {report.pop("rank"): report for report in reports}

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append ``entry`` to the log."""
        # The rank makes equal entries of two ranks differ, so that each knows whose was taken.
        text = json.dumps({**entry, "by": self.rank}, sort_keys=True)
        while True:
            index = self.state.next()
            while self.store.compare_set(f"log/{index}", "", text).decode() != text:
                index += 1
            if self.state.wrote(index):
                return
            # What stood there was read by all ranks and deleted, while this thread was on its way.
            self.tidy(f"log/{index}")

    def read(self, index: int) -> Optional[dict[str, Any]]:
        """Entry ``index`` of the log; None when there is none after ``READ`` seconds."""
        import torch.distributed as dist

        try:
            self.reading.wait([f"log/{index}"], timedelta(seconds=READ))
        except dist.DistStoreError:
            if self.reading.check([f"log/{index}"]):
                raise
            return None
        return json.loads(self.reading.get(f"log/{index}").decode())

    def tidy(self, *keys: str) -> None:
        """Delete what no rank will look at again, so that the store does not grow with every turn."""
        for key in keys:  # no rank tells or reads them any more
            with suppress(RuntimeError):  # stores in files cannot
                self.store.delete_key(key)


def _append(store: Any, key: str, line: str) -> None:
    if store.has_extended_api():
        store.append(key, line)
        return
    before = ""
    while True:
        after = store.compare_set(key, before, before + line).decode()
        if after == before + line:
            return
        before = after


def open_ranks(process_group: Any) -> Optional[Ranks]:
    """The ranks of ``process_group``'s world; None when it has but one. Collective in number only.

    A store may outlive its world (torchrun's agent keeps one for all worlds of a job): each world
    counts, per rank, how many were opened before, and has a log of its own.
    """
    if process_group.size() == 1:
        return None
    import torch.distributed.distributed_c10d as c10d

    opened = _opened.get(process_group)
    if opened is None:
        _, world_store = c10d._world.pg_map[process_group]
        opened = connect(process_group.rank(), process_group.size(), world_store)
        _opened[process_group] = opened
    return opened


def connect(rank: int, size: int, world_store: Any) -> Ranks:
    """Rank ``rank`` of the ``size`` that share ``world_store``."""
    import torch.distributed.distributed_c10d as c10d

    connection = _another_connection(world_store)
    if connection is not world_store:  # the timeout of that one is its owner's
        connection.set_timeout(timedelta(seconds=OPERATION))
    store = c10d.PrefixStore(PREFIX, connection)
    generation = store.add(f"generation/{rank}", 1)
    return Ranks(
        rank,
        size,
        generation,
        c10d.PrefixStore(f"{generation}", store),
        c10d.PrefixStore(f"{PREFIX}/{generation}", _another_connection(world_store)),
    )


def _another_connection(store: Any) -> Any:
    """A TCPStore has one connection, which whoever waits in it keeps from all others (2.14.1)."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # a store without connections
        return store


def opened() -> list[Ranks]:
    """Those of every world that this process was in and that still exists."""
    return list(_opened.values())
