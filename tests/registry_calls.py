"""Helpers for tests that call the registry directly, without SGLang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_distguard import _core
from sglang_distguard.sync import waiting


def request(key: Any, spec: Any, **options: Any) -> _core.Request:
    """A request for ``key`` with the usual options; ``options`` replace them."""
    usual = {"runner": None, "reuse": True, "reentrant": False, "slow_after": 30.0}
    arguments: dict[str, Any] = {**usual, **options}
    return _core.Request(key, spec, **arguments)


def acquire(key: str, *, size: int = 1, timeout: float = 30.0, **options: Any) -> _core.Claim:
    """Request ``key``, for which no object exists yet."""
    asked = request(key, {"size": size}, **options)
    return waiting.until(lambda: asked.try_acquire(None), asked, timeout=timeout, what=key)


def state_of(key: str) -> dict[str, Any]:
    """The slot of ``key`` in a snapshot; empty before its first request."""
    slots = _core.snapshot()["slots"]
    return next((slot for slot in slots if slot["key"] == key), {})


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until ``condition`` holds."""
    nothing = threading.Event()
    while not condition():
        nothing.wait(0.001)


def waits_for(key: str) -> Callable[[], bool]:
    """Whether any thread waits for ``key`` now."""
    return lambda: state_of(key).get("waiters", 0) > 0


def run_in_threads(*works: Callable[[], None]) -> None:
    """Run each in its own thread (T1, T2, ...) until all have ended."""
    threads = [threading.Thread(target=work, name=f"T{n}") for n, work in enumerate(works, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a wait without end"


def in_line(phase: str) -> Callable[[], bool]:
    """Whether any thread waits for ``phase`` now."""
    return lambda: any(
        visit["phase"] == f"phase:{phase}" and not visit["inside"]
        for visit in _core.snapshot()["phases"]
    )


def inside() -> list[str]:
    """The phases that threads are in now."""
    return [visit["phase"] for visit in _core.snapshot()["phases"] if visit["inside"]]


@contextmanager
def leader_of(key: str) -> Iterator[threading.Thread]:
    """A thread that leads ``key`` and does not finish before the with block does."""
    leading, finish = threading.Event(), threading.Event()

    def lead() -> None:
        claim = acquire(key, runner="slow one")
        leading.set()
        wait_in_the_initialiser(finish)
        claim.fail("on purpose")

    thread = threading.Thread(target=lead, name="the leader")
    thread.start()
    assert leading.wait(30)
    try:
        yield thread
    finally:
        finish.set()
        thread.join()
        _core.forget(key)


def wait_in_the_initialiser(finish: threading.Event) -> None:
    """Block the leader; tests look for this function's name in stacks."""
    assert finish.wait(60)
