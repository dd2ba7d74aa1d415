"""Waits for another thread's initialisation: deadline, error facts, interrupts, failed leaders."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import sglang_distguard
from registry_calls import acquire, leader_of, state_of, until, waits_for
from sglang_distguard import _core
from sglang_distguard.errors import AcquireTimeout, PoisonedState, SpecMismatch
from sglang_distguard.sync import event_log, waiting


def test_a_timeout_error_names_the_leader_its_stack_and_the_seconds_waited() -> None:
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


def test_an_unequal_request_is_refused_while_the_leader_is_still_running() -> None:
    with leader_of("groups:unequal"), pytest.raises(SpecMismatch, match="'slow one'"):
        acquire("groups:unequal", size=2)


@pytest.fixture
def control_c() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt, even if a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_control_c_ends_a_wait_and_leaves_nothing_behind(control_c: None) -> None:
    def interrupt_when_it_waits() -> None:
        until(waits_for("groups:signal"))
        os.kill(os.getpid(), signal.SIGINT)

    with leader_of("groups:signal"):
        thread = threading.Thread(target=interrupt_when_it_waits)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            acquire("groups:signal")
        thread.join()
        assert not waits_for("groups:signal")()


class _Counting:
    """Returns from each wait at once, and records its seconds."""

    patience = 30.0

    def __init__(self) -> None:
        self.asked: list[float] = []

    def wait(self, seconds: float) -> None:
        self.asked.append(seconds)

    def timed_out(self) -> Exception:
        return AssertionError("nothing here waits that long")


def test_only_the_thread_that_gets_signals_looks_for_them() -> None:
    def longest() -> list[float]:
        waits, answers = _Counting(), iter([None, "done"])
        waiting.until(lambda: next(answers), waits, timeout=100, what="nothing")
        return waits.asked

    elsewhere: list[float] = []
    thread = threading.Thread(target=lambda: elsewhere.extend(longest()))
    thread.start()
    thread.join()
    assert longest() == [waiting.SLICE]
    assert elsewhere == [_Counting.patience]


def test_an_interrupt_in_the_initialiser_undoes_it_and_one_after_the_publish_does_not() -> None:
    from sglang_distguard.sync.single_flight import run_once

    undone: list[str] = []

    def attempt(observe: object) -> None:
        run_once(
            "groups:interrupted",
            {"size": 1},
            observe=observe,  # type: ignore[arg-type]
            initialise=lambda: "made",
            adopt=lambda: ("adopted", {"size": 1}),
            join=lambda found: found,
            undo=lambda: undone.append("undone"),
        )

    looks: list[int] = []

    def interrupted_at_the_second_look() -> None:
        looks.append(1)
        if len(looks) == 2:  # after the initialiser, before the publish
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted_at_the_second_look)
    assert undone == ["undone"]

    note, calls = _core.note_joined, []

    def interrupted(key: str, generation: int) -> None:
        calls.append(generation)
        raise KeyboardInterrupt

    _core.note_joined = interrupted  # called right after the publish
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt(lambda: None)
    finally:
        _core.note_joined = note
    assert len(calls) == 1
    assert undone == ["undone"]  # others may use it already
    assert _core.is_ready("groups:interrupted")
    _core.forget("groups:interrupted")


def test_a_slow_leader_is_logged_once_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    event_log.report()
    with (
        caplog.at_level(logging.WARNING, "sglang_distguard"),
        leader_of("groups:slow") as leader,
    ):
        for _ in range(3):
            with pytest.raises(AcquireTimeout):
                acquire("groups:slow", timeout=0.1, slow_after=0.0)
    (record,) = caplog.records
    text = record.getMessage()
    for fact in ("groups:slow", "slow by runner 'slow one'", leader.name, "in wait_in_the_init"):
        assert fact in text


def test_the_deadline_can_be_set_per_call_scope_process_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_distguard.config import settings

    assert settings.current().timeout == 300.0
    monkeypatch.setenv("SGLANG_DISTGUARD_TIMEOUT", "7.5")
    assert settings.seconds_from_environment(settings.TIMEOUT_VARIABLE) == 7.5
    with sglang_distguard.runner_scope(timeout=5):
        assert settings.current().timeout == 5.0
        with sglang_distguard.runner_scope("inner"):
            assert settings.current().timeout == 5.0
    assert settings.current().timeout == 300.0


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


def test_a_teardown_that_is_dropped_before_it_starts_leaves_the_state_and_after_that_poisons_it() -> (
    None
):
    acquire("groups:torn").publish(identity=1, resource=None)
    teardown = _core.begin_teardown("groups:torn", runner=None, force=False)
    del teardown
    assert state_of("groups:torn")["state"] == "ready"
    teardown = _core.begin_teardown("groups:torn", runner=None, force=False)
    teardown.start()
    del teardown
    assert state_of("groups:torn")["state"] == "poisoned"
    _core.reset(force=False)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="known: "):
        acquire("nonsense")
