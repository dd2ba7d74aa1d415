"""The loop of an engine: what is handed to it while it ends has an end, too."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import suppress
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


def test_a_coroutine_that_is_handed_over_after_the_loop_has_stopped_is_refused_or_begins(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[Future[str]] = []
    stop = thread.loop.stop

    def stop_and_submit() -> None:
        stop()
        with suppress(LoopEnded):  # the loop's second stop, at its very end
            handed_over.append(thread.submit(work()))

    monkeypatch.setattr(thread.loop, "stop", stop_and_submit)
    assert thread.end(MANY)
    assert [it.result(MANY) for it in handed_over] == ["ran"]


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_coroutine_that_is_handed_over_as_the_end_begins_begins(
    thread: LoopThread, turns: int
) -> None:
    """``turns``: of the loop, by which it comes later than the order to end."""
    is_held, may_go = threading.Event(), threading.Event()
    ends: list[str] = []

    async def hold() -> None:
        is_held.set()
        may_go.wait(MANY)

    def hand_over(turns: int) -> None:
        if turns:
            thread.loop.call_soon_threadsafe(hand_over, turns - 1)
            return
        try:
            thread.submit(work()).add_done_callback(lambda it: ends.append(it.result(0)))
        except LoopEnded:
            ends.append("refused")

    thread.submit(hold())
    assert is_held.wait(MANY)
    thread.call_soon(thread._stop)  # as `end` does, without waiting
    hand_over(turns)
    may_go.set()
    assert thread.end(MANY)
    assert ends == ["ran"] if turns < 2 else ends in (["ran"], ["refused"])


def test_a_loop_that_is_told_to_end_twice_waits_for_what_it_cancels(thread: LoopThread) -> None:
    seen: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            thread._stop()
            await asyncio.sleep(0)
            seen.append("ended")

    waiting = thread.submit(wait())
    thread.submit(work()).result(MANY)
    assert thread.end(MANY)
    assert waiting.cancelled()
    assert seen == ["ended"]


def test_an_error_that_ends_the_loop_is_told_before_what_waits_is_cancelled() -> None:
    told: list[BaseException] = []
    seen: list[int] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            seen.append(len(told))

    async def leave() -> None:
        raise SystemExit(3)

    thread = LoopThread("loop", lambda: None, told.append)
    thread.start()
    thread.started.result(MANY)
    waiting = thread.submit(wait())
    thread.submit(leave())
    assert thread.end(MANY)
    assert waiting.cancelled()
    assert [repr(it) for it in told] == ["SystemExit(3)"]
    assert seen == [1]


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
