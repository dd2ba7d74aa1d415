"""The loop of an engine: what is handed to it while it ends has an end, too."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from sglang_distguard.engines.loops import LoopEnded, LoopThread

MANY = 60.0  # seconds; nothing here takes more than a fraction of it


@pytest.fixture
def thread() -> LoopThread:
    made = LoopThread("loop", lambda: None)
    made.start()
    made.started.result(MANY)
    return made


async def work() -> str:
    return "ran"


def test_a_coroutine_that_is_handed_over_after_the_loop_was_told_to_stop_runs(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[Future[str]] = []
    stop = thread.loop.stop

    def stop_and_submit() -> None:
        stop()
        late.append(thread.submit(work()))

    monkeypatch.setattr(thread.loop, "stop", stop_and_submit)
    assert thread.end(MANY)
    assert [it.result(MANY) for it in late] == ["ran"]


def test_a_coroutine_that_is_handed_over_as_the_end_begins_begins(thread: LoopThread) -> None:
    is_held, may_go = threading.Event(), threading.Event()
    begun: list[str] = []

    async def hold() -> None:
        is_held.set()
        may_go.wait(MANY)

    async def begins() -> None:
        begun.append("begun")

    holding = thread.submit(hold())
    assert is_held.wait(MANY)
    ending = thread.submit(thread._stop())  # as `end` does, without waiting
    after = thread.submit(begins())
    may_go.set()
    for it in (holding, ending, after):
        it.result(MANY)
    assert begun == ["begun"]


def test_a_loop_that_has_ended_or_could_not_be_set_up_refuses_coroutines(
    thread: LoopThread,
) -> None:
    def fail() -> None:
        raise ValueError("planted")

    failed = LoopThread("failed", fail)
    failed.start()
    with pytest.raises(ValueError, match="planted"):
        failed.started.result(MANY)
    for it in (thread, failed):
        assert it.end(MANY)
        with pytest.raises(LoopEnded, match=f"the loop of {it._thread.name} has ended"):
            it.submit(work())


def test_what_waits_in_a_loop_that_ends_is_cancelled(thread: LoopThread) -> None:
    async def wait() -> Any:
        await asyncio.Event().wait()

    waiting = thread.submit(wait())
    assert thread.end(MANY)
    assert waiting.cancelled()
