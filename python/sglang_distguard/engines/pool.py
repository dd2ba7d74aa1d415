"""``Pool``: engines by name, opened, replaced and closed while others serve.

A name may have several engines, which share weights (``Replicas``); it is changed as a whole.

A name is free, held by an engine that starts (`loading`), by one that serves, or by one that is being
closed. One thread at a time changes a name: a second `load`, `replace` or `close` of the same name
is refused, other names are not affected.

Lock order: `_lock` is a leaf; engines are started and closed without it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from sglang_distguard.config.checks import check_name, check_whole
from sglang_distguard.engines.context_manager import Closes
from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.loops import in_thread
from sglang_distguard.engines.replicas import Replicas
from sglang_distguard.engines.weights import memory_of_all
from sglang_distguard.errors import EngineClosed, StateInUse, UnknownEngine
from sglang_distguard.runner.memory import Memory

State = Literal["loading", "serving", "failed", "closing"]
#: What a name has: an engine, or several ones that share weights.
Served = Union[Engine, Replicas]


@dataclass(frozen=True)
class EngineInfo:
    """One name of a pool.

    Attributes:
        name: the name.
        state: "loading", "serving", "failed" or "closing".
        model: path of the model; empty while the first engine of the name is loading.
        pending: number of requests that are not answered yet.
        memory: of its tensors; None while the first engine of the name is loading, and when the
            last one is closed. What several names share is in the memory of each.
        replicas: one entry for each engine, of a name that has several.
    """

    name: str
    state: State
    model: str
    pending: int
    memory: Optional[Memory] = None
    replicas: tuple[EngineInfo, ...] = ()


class Pool(Closes):
    """Engines of this process by name; see ``Engine``.

    All methods may be called from any thread; those that begin with ``a`` are coroutines, for any
    asyncio loop. A pool is a context manager, which closes all engines.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[str, Served] = {}
        self._changing: dict[str, State] = {}

    def load(self, name: str, *, replicas: Optional[int] = None, **arguments: Any) -> Served:
        """Open an engine under a free name; return it when it serves. Others go on serving.

        Args:
            name: the name.
            replicas: open so many engines, at least 1, which share weights; see ``Replicas``.
                None opens one ``Engine``.
            **arguments: of ``Engine``.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range.
            StateInUse: the name is taken.
            Everything that ``Engine`` raises; the name is free again then.
        """
        check_name(name)
        _check_replicas(replicas)
        with self._change(name, "loading", must_exist=False):
            engine = _opened(name, replicas, arguments)
            with self._lock:
                self._engines[name] = engine
            return engine

    def replace(
        self,
        name: str,
        *,
        drain: float = 30.0,
        replicas: Optional[int] = None,
        **arguments: Any,
    ) -> Served:
        """Open another engine and give it the name; the one that had it serves until then.

        Both are in memory meanwhile. If the other one does not start, the old one keeps the name.

        Args:
            name: of an engine of this pool.
            drain: seconds to wait for requests that the old engine has accepted.
            replicas: as in ``load``. The new engine has as many as is said here, not as the old.
            **arguments: of ``Engine``.

        Raises:
            UnknownEngine: no engine has the name.
            StateInUse: another thread is changing it.
            Everything that ``Engine`` raises.
        """
        _check_replicas(replicas)
        with self._change(name, "loading", must_exist=True):
            made = _opened(name, replicas, arguments)
            with self._lock:
                old, self._engines[name] = self._engines[name], made
            old.close(drain)
            return made

    def close(self, name: str, *, drain: float = 30.0) -> None:
        """Close an engine and free its name; new requests are refused at once.

        Args:
            name: of an engine of this pool.
            drain: seconds to wait for its pending requests.

        Raises:
            UnknownEngine: no engine has the name.
            StateInUse: another thread is changing it.
        """
        with self._change(name, "closing", must_exist=True):
            try:
                self._engines[name].close(drain)
            finally:
                with self._lock:
                    del self._engines[name]

    def close_all(self, *, drain: float = 30.0) -> None:
        """Close all engines, at once; the first error is raised after all have ended."""
        names = list(self)
        if not names:
            return
        with ThreadPoolExecutor(len(names), thread_name_prefix="distguard-close") as threads:
            done = [threads.submit(self.close, name, drain=drain) for name in names]
        for it in done:
            it.result()

    async def aload(self, name: str, **arguments: Any) -> Served:
        """As ``load``, without blocking the caller's loop."""
        return await in_thread(self.load, name, **arguments)

    async def areplace(self, name: str, *, drain: float = 30.0, **arguments: Any) -> Served:
        """As ``replace``, without blocking the caller's loop."""
        return await in_thread(self.replace, name, drain=drain, **arguments)

    async def aclose(self, name: str, *, drain: float = 30.0) -> None:
        """As ``close``, without blocking the caller's loop."""
        await in_thread(self.close, name, drain=drain)

    def __getitem__(self, name: str) -> Served:
        """The engine of this name, or its replicas, which have the same methods for requests.

        Raises:
            UnknownEngine: no engine has the name, or it is still loading.
        """
        with self._lock:
            found = self._engines.get(name)
            known, state = sorted(self._engines), self._changing.get(name)
        if found is None:
            reason = "is still loading" if state == "loading" else "is not in this pool"
            raise UnknownEngine(
                f"engine {name!r} {reason}; serving: {', '.join(known) or 'none'}",
                engine=name,
                known=known,
            )
        return found

    def __iter__(self) -> Iterator[str]:
        """The names of the engines, sorted."""
        with self._lock:
            return iter(sorted(self._engines))

    def __len__(self) -> int:
        return len(self._engines)

    def __contains__(self, name: object) -> bool:
        return name in self._engines

    def list(self) -> list[EngineInfo]:
        """The state and the memory of every name, sorted by name."""
        with self._lock:
            engines, changing = dict(self._engines), dict(self._changing)
        found = []
        for name in sorted(engines.keys() | changing.keys()):
            engine = engines.get(name)
            if engine is None:
                found.append(EngineInfo(name, changing[name], "", 0))
            else:
                found.append(_info(name, engine, is_closing=changing.get(name) == "closing"))
        return found

    def memory(self) -> Memory:
        """Memory of all engines; weights that several of them share count once."""
        with self._lock:
            served = list(self._engines.values())
        engines = [it.engines if isinstance(it, Replicas) else (it,) for it in served]
        return memory_of_all(engine for group in engines for engine in group)

    @contextmanager
    def _change(self, name: str, state: State, *, must_exist: bool) -> Iterator[None]:
        """Reserve ``name`` for one change."""
        with self._lock:
            other = self._changing.get(name)
            if other is not None:
                raise StateInUse(
                    f"engine {name!r} is {other} in another thread; try again when that has ended",
                    engine=name,
                    state=other,
                )
            if must_exist and name not in self._engines:
                known = ", ".join(sorted(self._engines)) or "none"
                raise UnknownEngine(
                    f"engine {name!r} is not in this pool; known: {known}",
                    engine=name,
                    known=sorted(self._engines),
                )
            if not must_exist and name in self._engines:
                raise StateInUse(
                    f"the name {name!r} is taken by an engine of {self._engines[name].model_path}; "
                    "close it first, or use replace()",
                    engine=name,
                    state="serving",
                )
            self._changing[name] = state
        try:
            yield
        finally:
            with self._lock:
                del self._changing[name]

    def _close_at_end(self) -> None:
        self.close_all()


def _check_replicas(replicas: Optional[int]) -> None:
    if replicas is not None:
        check_whole("replicas", replicas, least=1)


def _opened(name: str, replicas: Optional[int], arguments: dict[str, Any]) -> Served:
    if replicas is None:
        return Engine(name=name, **arguments)
    return Replicas.open(name, replicas, arguments)


def _info(name: str, engine: Served, *, is_closing: bool) -> EngineInfo:
    state: State = "failed" if engine.failure is not None else "serving"
    try:
        memory = engine.memory()
    except EngineClosed:
        memory = None
    group = engine.engines if isinstance(engine, Replicas) else ()
    return EngineInfo(
        name,
        "closing" if is_closing else state,
        engine.model_path,
        engine.pending,
        memory,
        tuple(_info(it.name, it, is_closing=is_closing) for it in group),
    )
