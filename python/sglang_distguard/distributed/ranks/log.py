"""The ranks of one world, and the log that all of them append to and read, in their world's store.

The number of store operations is kept small. An ask, or the end of a turn or build, costs a rank
two (``tell``), and each entry of the log two more (``read``). The rank that reports last needs a
few to judge, write and tidy.

Waits for ranks have a deadline. The store answers other operations at once, or they fail with its
connection; torch 2.14.1 neither limits nor interrupts them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Optional
from weakref import WeakKeyDictionary

from sglang_distguard import _core
from sglang_distguard.distributed.ranks.liveness import Liveness

#: Prefix of the guard's keys, in a store that torch and other code use too.
PREFIX = "sglang_distguard"
#: Seconds that a reader sleeps in the store at most; an entry wakes it, also one about a timeout.
READ = 600.0
#: Seconds that a connection waits for keys that should exist.
OPERATION = 30.0

#: Ranks by torch's default group. After a failed agreement on a world, they retry in the same log.
_opened: WeakKeyDictionary[Any, Ranks] = WeakKeyDictionary()
#: Those of the parent process, in a forked child. They are kept, because dropping a store would close
#: the parent's connection.
_inherited: list[tuple[Any, Ranks]] = []


@dataclass(frozen=True)
class Ranks:
    """A world of several ranks, as one of them sees it.

    Attributes:
        rank: rank of this process.
        size: number of ranks.
        generation: number of the world among those that its ranks opened over one store.
        store: the world's store under a prefix, over a separate connection.
        reading: the same over another connection, so that a sleeping reader blocks no request.
        alive: signs of life of this rank and the others.
        state: what was agreed on, as far as this process has read the log.
        left: keys that no rank will use again, to be deleted with ``tidy``.
    """

    rank: int
    size: int
    generation: int
    store: Any
    reading: Any
    alive: Liveness
    state: _core.Agreement = field(default_factory=_core.Agreement)
    left: deque[str] = field(default_factory=deque)

    def tell(self, key: str, report: Mapping[str, Any]) -> bool:
        """Append this rank's ``report`` under ``key``; return True on the last rank to do so."""
        _append(self.store, key, json.dumps({"rank": self.rank, **report}) + "\n")
        return self.store.add(f"{key}/told", 1) == self.size

    def told(self, key: str) -> dict[int, dict[str, Any]]:
        """Return the reports under ``key``, by rank; this rank has reported before."""
        if not self.store.check([key]):
            return {}
        lines = self.store.get(key).decode().splitlines()
        reports = [json.loads(line) for line in lines]
        return {report.pop("rank"): report for report in reports}

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append ``entry`` to the log."""
        # The rank makes equal entries of two ranks differ, so that each knows which was taken.
        text = json.dumps({**entry, "by": self.rank}, sort_keys=True)
        while True:
            index = self.state.next()
            while self.store.compare_set(f"log/{index}", "", text).decode() != text:
                index += 1
            if self.state.wrote(index):
                return
            # All ranks had read an earlier entry at this index, and it was deleted meanwhile.
            self._delete(f"log/{index}")

    def read(self, index: int) -> Optional[dict[str, Any]]:
        """Return entry ``index`` of the log; None if it is missing after ``READ`` seconds."""
        import torch.distributed as dist

        try:
            self.reading.wait([f"log/{index}"], timedelta(seconds=READ))
        except dist.DistStoreError:
            if not self.reading.check([f"log/{index}"]):
                return None
            # Written after the wait had timed out.
        return json.loads(self.reading.get(f"log/{index}").decode())

    def tidy(self) -> None:
        """Delete the keys that are left, so that the store does not grow with turns.

        The thread that reads the log does it, when no rank waits for this one: half of the time of
        a turn was the rank's that deleted keys before it went on.
        """
        with suppress(IndexError):  # each key is taken once, also by several threads
            while True:
                self._delete(self.left.popleft())

    def _delete(self, key: str) -> None:
        with suppress(RuntimeError):  # file stores cannot delete
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
    """Return the ranks of ``process_group``'s world; None when it has only one rank.

    All ranks must call this equally often, but no rank waits for another. A store may outlive its
    world (torchrun's agent keeps one for all worlds of a job). So each world counts, per rank, how
    many were opened before, and has its own log.
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
    """Open the next generation as ``rank`` of the ``size`` ranks that share ``world_store``."""
    import torch.distributed.distributed_c10d as c10d

    connection = _another_connection(world_store)
    if connection is not world_store:  # the world store keeps its timeout
        connection.set_timeout(timedelta(seconds=OPERATION))
    store = c10d.PrefixStore(PREFIX, connection)
    generation = store.add(f"generation/{rank}", 1)
    own = c10d.PrefixStore(f"{generation}", store)
    return Ranks(
        rank,
        size,
        generation,
        own,
        c10d.PrefixStore(f"{PREFIX}/{generation}", _another_connection(world_store)),
        Liveness(rank, size, own),
    )


def _another_connection(store: Any) -> Any:
    """Return ``store`` over another connection, or ``store`` itself if it has no connections.

    A wait in a TCPStore blocks its only connection (torch 2.14.1).
    """
    try:
        return store.clone()
    except (AttributeError, RuntimeError):  # a store without connections
        return store


def start_afresh() -> None:
    """Forget the worlds of the parent process, in a forked child: it uses none of their stores.

    Their connections are the parent's, and threads that do not exist here may hold their locks.
    """
    for ranks in opened():
        ranks.alive.start_afresh()
    _inherited.extend(_opened.items())
    _opened.clear()


def opened() -> list[Ranks]:
    """Return the ranks of every world that this process was in and that still exists."""
    return list(_opened.values())
