"""``Replicas``: engines under one name that share weights; each request goes to one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard.context import metrics
from sglang_distguard.engines.context_manager import Closes
from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.loops import in_thread
from sglang_distguard.engines.refusals import CHANGING_WEIGHTS
from sglang_distguard.engines.weights import memory_of_all, refuse_if_shared
from sglang_distguard.errors import NotSupported
from sglang_distguard.runner.memory import Memory

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: Methods of an engine that are requests, or ask what is the same in every replica.
_OF_ONE = frozenset(
    [
        *("generate", "async_generate", "encode", "async_encode"),
        *("rerank", "score", "async_score"),
        *("get_model_info", "get_server_info", "get_weights_by_name"),
        *("save_sharded_model", "save_remote_model"),
    ]
)
#: Methods of an engine that are called on every replica that serves.
_OF_ALL = frozenset(["abort", "flush_cache"])


class Replicas(Closes):
    """Engines of one checkpoint that share weights, with the methods of one ``Engine``.

    A request goes to the engine that has the fewest pending ones, of equal ones in turn. An engine
    that has failed gets none; requests that it had raise ``EngineFailed``. Methods that need one
    engine (sessions, profiles, records) are called on one of ``engines``. Weights are not updated
    while several engines share them (``StateInUse``); ``Pool.replace`` opens others.
    """

    def __init__(self, name: str, engines: Sequence[Engine]) -> None:
        """Take engines that serve.

        Args:
            name: of all of them.
            engines: at least one.
        """
        if not engines:
            raise ValueError("replicas need at least one engine")
        self.name = name
        #: The engines, in the order in which they were opened.
        self.engines = tuple(engines)
        self._turns = itertools.count()

    @classmethod
    def open(cls, name: str, count: int, arguments: dict[str, Any]) -> Replicas:
        """Open ``count`` engines, named NAME/1, NAME/2 …; all share the weights of the first.

        If one fails to start, those before it are closed.

        Raises:
            Everything that ``Engine`` raises.
        """
        engines: list[Engine] = []
        try:
            for number in range(1, count + 1):
                shared = {"share_weights_with": engines[0]} if engines else {}
                engines.append(Engine(name=f"{name}/{number}", **{**arguments, **shared}))
        except BaseException:
            for engine in reversed(engines):
                engine.close(0)
            raise
        return cls(name, engines)

    def serving(self) -> Engine:
        """The engine that gets the next request: of those that have not failed, the least busy.

        If all have failed it is the first, whose methods say so.
        """
        able = [it for it in self.engines if it.failure is None]
        if not able:
            return self.engines[0]
        turn = next(self._turns)
        order = [able[(turn + place) % len(able)] for place in range(len(able))]
        return min(order, key=lambda it: it.pending)

    @property
    def failure(self) -> Optional[BaseException]:
        """What made the first engine fail if all have failed; None while one serves."""
        failures = [it.failure for it in self.engines]
        return None if None in failures else failures[0]

    @property
    def model_path(self) -> str:
        """Path of the model."""
        return self.engines[0].model_path

    @property
    def pending(self) -> int:
        """Number of calls that are not answered yet, of all engines."""
        return sum(it.pending for it in self.engines)

    def memory(self) -> Memory:
        """Memory of all engines; weights that they share count once.

        Raises:
            EngineClosed: they are closed.
        """
        self.engines[0]._check(may_have_failed=True)
        return memory_of_all(self.engines)

    def metrics(self) -> str:
        """As ``Engine.metrics``; each sample has the label ``replica``, the engine's name."""
        return metrics.text(self.metric_families())

    def metric_families(self, **labels: str) -> list[Metric]:
        """As ``metrics``, as prometheus_client's objects; ``labels`` are added to each sample."""
        found: list[Metric] = []
        for engine in self.engines:
            found += engine.metric_families(**labels, replica=engine.name)
        return metrics.together(found)

    def __getattr__(self, name: str) -> Any:
        """A method of ``Engine``, of one engine or of all; see the class."""
        if name.startswith("_") or "engines" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _OF_ONE:
            return getattr(self.serving(), name)
        if name in _OF_ALL:
            return self._of_all(name)
        if name in CHANGING_WEIGHTS:
            refuse_if_shared(self.serving(), name)
        getattr(self.engines[0], name)  # its own error, if no engine has it
        raise NotSupported(
            f"Replicas.{name} is not supported: it is about one engine. Call it on one of "
            f"pool[{self.name!r}].engines; to change weights, open others with Pool.replace",
            engine=self.name,
        )

    def _of_all(self, name: str) -> Callable[..., Any]:
        able = [it for it in self.engines if it.failure is None] or [self.engines[0]]

        def call(*args: Any, **kwargs: Any) -> Any:
            return [getattr(it, name)(*args, **kwargs) for it in able][-1]

        return call

    def close(self, drain: float = 30.0) -> None:
        """End all engines, at once; the first error is raised after all have ended.

        Args:
            drain: seconds to wait for pending requests; see ``Engine.close``.
        """
        with ThreadPoolExecutor(len(self.engines), thread_name_prefix="distguard-close") as threads:
            done = [threads.submit(it.close, drain) for it in self.engines]
        for ended in done:
            ended.result()

    async def aclose(self, drain: float = 30.0) -> None:
        """As ``close``, without blocking the caller's loop."""
        await in_thread(self.close, drain)

    shutdown = close

    def _close_at_end(self) -> None:
        self.close()

    def __repr__(self) -> str:
        able = sum(it.failure is None for it in self.engines)
        return f"<Replicas {self.name!r}, {able} of {len(self.engines)} serving>"
