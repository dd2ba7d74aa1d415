"""Waiting for another thread's initialisation: deadline, facts, interruption, deadlock."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sglang_distguard import _core
from sglang_distguard.errors import AcquireTimeout, DeadlockError, PoisonedState, SpecMismatch


def acquire(key: str, *, size: int = 1, timeout: float = 30.0, **options: Any) -> _core.Claim:
    """One request for ``key``, of which nothing is there yet."""
    arguments: dict[str, Any] = {"runner": None, "reuse": True, "reentrant": False, **options}
    return _core.acquire(key, {"size": size}, timeout=timeout, observe=lambda: None, **arguments)


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
    assert finish.wait(30)


def test_a_deadline_that_passes_tells_who_leads_where_and_since_when() -> None:
    with leader_of("groups:timeout") as thread, pytest.raises(AcquireTimeout) as caught:
        acquire("groups:timeout", timeout=0.1)
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.details["leader_thread"] == thread.ident
    assert error.details["waited"] >= 0.1
    assert "wait_in_the_initialiser" in error.details["stack"]
    for fact in ("'slow one'", "the leader", "groups:timeout", "wait_in_the_initialiser"):
        assert fact in str(error)


def test_a_waiter_leads_when_the_leader_failed() -> None:
    decisions: list[str] = []
    with leader_of("groups:handover"):
        waiter = threading.Thread(
            target=lambda: decisions.append(acquire("groups:handover").decision)
        )
        waiter.start()
    waiter.join()
    assert decisions == ["lead"]


def test_an_unequal_request_is_refused_while_the_leader_is_still_at_it() -> None:
    with leader_of("groups:unequal"), pytest.raises(SpecMismatch, match="'slow one'"):
        acquire("groups:unequal", size=2)


def test_a_wait_ends_at_a_signal_whose_handler_raises() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with leader_of("groups:signal"), pytest.raises(Interrupted):
            acquire_interrupted("groups:signal")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def acquire_interrupted(key: str) -> None:
    """Wait for ``key`` with a signal under way."""
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    acquire(key)


def test_asking_again_for_what_one_initialises_is_a_deadlock_unless_expected() -> None:
    claim = acquire("groups:again")
    with pytest.raises(DeadlockError):
        acquire("groups:again")
    assert acquire("groups:again", reentrant=True).decision == "nested"
    claim.fail("done")


def test_two_threads_that_wait_for_each_other_are_told_at_once() -> None:
    both = threading.Barrier(2)
    results: list[str] = []

    def work(first: str, second: str) -> None:
        claim = acquire(first)
        both.wait()
        try:
            acquire(second).fail("not needed")
            results.append("went on")
        except DeadlockError as error:
            results.append(f"deadlock of {len(error.details['cycle'])}")
        finally:
            claim.fail("done")

    pairs = (("groups:a", "groups:b"), ("groups:b", "groups:a"))
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["deadlock of 2", "went on"]


def test_a_leader_that_ends_without_a_result_hands_over() -> None:
    claim = acquire("groups:dropped")
    del claim
    claim = acquire("groups:dropped")
    assert claim.decision == "lead"
    claim.fail("done")


def test_poisoned_state_is_refused_until_reset() -> None:
    acquire("groups:poisoned").poison("could not undo it")
    with pytest.raises(PoisonedState, match="could not undo it"):
        acquire("groups:poisoned")
    _core.reset(force=False)
    claim = acquire("groups:poisoned")
    assert claim.decision == "lead"
    claim.fail("done")


def test_a_key_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="known: "):
        acquire("nonsense")
