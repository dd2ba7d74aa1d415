"""threading, concurrent.futures, multiprocessing.pool: work runs as the execution that submits it.

A thread belongs to the code that starts it. Work in a pool belongs to the code that submits it, not
to the code that made the pool or its threads. asyncio carries contexts by itself, also to other
threads and loops (`run_coroutine_threadsafe`, `to_thread`). The cost is one ContextVar read per
thread or task that belongs to no runner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.context import default_dtype
from sglang_distguard.patching import Around


def _start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: Any) -> None:
        execution = _core.carried_execution()
        if execution is None:
            original(self)
            return
        run = self.run

        def run_as_execution() -> None:
            del self.run  # the attribute set below would keep thread and execution alive
            with _core.run_as(execution), default_dtype.intercepting():
                run()

        self.run = run_as_execution
        try:
            original(self)
        except BaseException:
            vars(self).pop("run", None)
            raise

    return start


def _carried(function: Callable[..., Any], execution: Any) -> Callable[..., Any]:
    """Return ``function`` wrapped so that it runs as ``execution`` wherever it is called."""

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Any:
        with _core.run_as(execution), default_dtype.intercepting():
            return function(*args, **kwargs)

    return carried


def _hands_over(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hook a method (self, func, ...) of a pool whose threads run ``func``."""

    @functools.wraps(original)
    def hand_over(*args: Any, **kwargs: Any) -> Any:
        execution = _core.carried_execution()
        # A pool of processes runs its work in other processes, and pickles it.
        if execution is None or not _has_threads(args[0]):
            return original(*args, **kwargs)
        given = list(args)
        if len(given) > 1:
            given[1] = _carried(given[1], execution)
        elif "func" in kwargs:
            kwargs["func"] = _carried(kwargs["func"], execution)
        with _core.run_as(None):  # threads that the pool starts for it belong to no runner
            return original(*given, **kwargs)

    return hand_over


def _without_execution(original: Callable[..., Any]) -> Callable[..., Any]:
    """Start threads of a pool or a service for no runner: they outlive the code that made it."""

    @functools.wraps(original)
    def without_execution(*args: Any, **kwargs: Any) -> Any:
        if _core.current_execution() is None:
            return original(*args, **kwargs)
        with _core.run_as(None):
            return original(*args, **kwargs)

    return without_execution


def _has_threads(pool: Any) -> bool:
    from concurrent.futures import ThreadPoolExecutor
    from multiprocessing.pool import ThreadPool

    return isinstance(pool, (ThreadPool, ThreadPoolExecutor))


CHANGES = (
    Around("threading", "Thread.start", _start),
    Around("concurrent.futures.thread", "ThreadPoolExecutor.submit", _hands_over),
    *(
        # (self, func, ...): `apply`, `map` and `starmap` go through them (CPython 3.11 to 3.13).
        Around("multiprocessing.pool", f"Pool.{name}", _hands_over)
        for name in ("apply_async", "_map_async", "imap", "imap_unordered")
    ),
    Around("multiprocessing.pool", "Pool.__init__", _without_execution),
    Around("multiprocessing.pool", "Pool._repopulate_pool_static", _without_execution),
    # One thread for all progress bars of the process, started by the first (tqdm 4.67), and one for
    # all memory that is shared with other processes (`update_weights_from_tensor` shares it).
    Around("tqdm._monitor", "TMonitor.__init__", _without_execution),
    Around("multiprocessing.resource_sharer", "_ResourceSharer._start", _without_execution),
)
