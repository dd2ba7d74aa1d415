"""threading, concurrent.futures, multiprocessing.pool: work runs as the execution that handed it over.

A thread belongs to the code that starts it; work in a pool to the code that hands it over, and not to
what made the pool or its threads. asyncio carries contexts by itself, also to other threads and loops
(`run_coroutine_threadsafe`, `to_thread`). Costs one ContextVar read per thread or task of no runner.
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
            del self.run  # the instance attribute below: it would keep thread and execution alive
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
    """``function``, run as ``execution`` wherever it is called."""

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Any:
        with _core.run_as(execution), default_dtype.intercepting():
            return function(*args, **kwargs)

    return carried


def _hands_over(position: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a method of a pool whose argument at ``position`` is what the pool's threads run."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def hand_over(*args: Any, **kwargs: Any) -> Any:
            execution = _core.carried_execution()
            # Processes of a pool are other processes; what they run is pickled.
            if execution is None or not _has_threads(args[0]) or len(args) <= position:
                return original(*args, **kwargs)
            given = list(args)
            given[position] = _carried(args[position], execution)
            with _core.run_as(None):  # threads that the pool starts for it are nobody's
                return original(*given, **kwargs)

        return hand_over

    return make


def _of_nobody(original: Callable[..., Any]) -> Callable[..., Any]:
    """Threads that a pool or a service starts are its own: they outlive the code that made it."""

    @functools.wraps(original)
    def of_nobody(*args: Any, **kwargs: Any) -> Any:
        if _core.current_execution() is None:
            return original(*args, **kwargs)
        with _core.run_as(None):
            return original(*args, **kwargs)

    return of_nobody


def _has_threads(pool: Any) -> bool:
    from concurrent.futures import ThreadPoolExecutor
    from multiprocessing.pool import ThreadPool

    return isinstance(pool, (ThreadPool, ThreadPoolExecutor))


CHANGES = (
    Around("threading", "Thread.start", _start),
    Around("concurrent.futures.thread", "ThreadPoolExecutor.submit", _hands_over(1)),
    *(
        # (self, func, ...): `apply`, `map` and `starmap` go through them (CPython 3.11 to 3.13).
        Around("multiprocessing.pool", f"Pool.{name}", _hands_over(1))
        for name in ("apply_async", "_map_async", "imap", "imap_unordered")
    ),
    Around("multiprocessing.pool", "Pool.__init__", _of_nobody),
    Around("multiprocessing.pool", "Pool._repopulate_pool_static", _of_nobody),
    # One thread for all progress bars of the process, started by the first (tqdm 4.67).
    Around("tqdm._monitor", "TMonitor.__init__", _of_nobody),
)
