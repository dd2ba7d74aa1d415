"""Waits for slots and phases that would never end are refused; SGLang's own nesting is not."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sglang_distguard
from registry_calls import acquire, in_line, run_in_threads, until, waits_for
from sglang_distguard import _core
from sglang_distguard.errors import AcquireTimeout, DeadlockError
from sglang_distguard.sync.phases import in_phase


def test_a_thread_that_asks_again_for_what_it_initialises_is_told_at_once() -> None:
    claim = acquire("groups:again")
    with pytest.raises(DeadlockError, match=r"waits for groups:again \(held by") as caught:
        acquire("groups:again")
    assert caught.value.details["cycle"] == [(threading.get_ident(), "groups:again")]
    assert acquire("groups:again", reentrant=True).decision == "nested"
    claim.fail("done")


@pytest.mark.parametrize("threads", [2, 3])
def test_of_threads_that_wait_for_each_other_in_a_ring_one_is_told_at_once(threads: int) -> None:
    all_lead = threading.Barrier(threads)
    results: list[str] = []

    def work(own: str, wanted: str) -> None:
        claim = acquire(own)
        all_lead.wait()
        try:
            acquire(wanted).fail("not needed")
            results.append("went on")
        except DeadlockError as error:
            results.append(f"deadlock of {len(error.details['cycle'])}")
        finally:
            claim.fail("done")

    names = [f"groups:{number}" for number in range(threads)]
    pairs = zip(names, names[1:] + names[:1], strict=True)
    run_in_threads(*(lambda pair=pair: work(*pair) for pair in pairs))
    assert sorted(results) == [f"deadlock of {threads}"] + ["went on"] * (threads - 1)
    assert not any(waits_for(name)() for name in names)


def test_a_cycle_over_a_key_and_a_phase_names_both() -> None:
    leads, inside = threading.Event(), threading.Event()
    cycles: list[Any] = []

    def leader() -> None:
        claim = acquire("groups:initialised in a capture")
        leads.set()
        assert inside.wait(30)
        try:
            with in_phase("capture"):  # the other thread is in a forward
                pass
        except DeadlockError as error:
            cycles.append(error)
        finally:
            claim.fail("done")

    def forwarder() -> None:
        assert leads.wait(30)
        try:
            with in_phase("forward"):
                inside.set()
                acquire("groups:initialised in a capture").fail("not needed")
        except DeadlockError as error:
            cycles.append(error)

    run_in_threads(leader, forwarder)
    (error,) = cycles
    text = str(error)
    assert "phase:capture" in text
    assert "groups:initialised in a capture" in text
    assert "thread T1" in text
    assert "thread T2" in text


def test_two_threads_inside_a_forward_that_both_want_to_capture_are_told() -> None:
    both = threading.Barrier(2)
    results: list[str] = []

    def work() -> None:
        try:
            with in_phase("forward"):
                both.wait()
                with in_phase("capture"):
                    results.append("captured")
        except DeadlockError:
            results.append("deadlock")

    run_in_threads(work, work)
    assert sorted(results) == ["captured", "deadlock"]


def test_a_capture_waits_for_forwards_keeps_later_ones_out_and_runs_its_own() -> None:
    order: list[str] = []
    inside, done = threading.Event(), threading.Event()

    def forwards() -> None:
        with in_phase("forward"):
            inside.set()
            assert done.wait(30)
            order.append("first forward")

    def captures() -> None:
        assert inside.wait(30)
        with in_phase("capture"), in_phase("forward"):  # a capture runs forwards
            order.append("capture")

    def late() -> None:
        until(in_line("capture"))
        later = _core.Visit("forward", runner=None)
        # It could overlap the running forward, but comes after the capture.
        assert not later.try_enter()
        done.set()
        with in_phase("forward"):
            order.append("late forward")
        later.leave()

    run_in_threads(forwards, captures, late)
    assert order == ["first forward", "capture", "late forward"]
    assert _core.snapshot()["phases"] == []


def test_a_thread_that_the_first_in_line_waits_for_may_overtake_it() -> None:
    """T1 forwards and asks for a load; a capture in line before that load waits for T1."""
    inside = threading.Event()
    order: list[str] = []

    def forwards() -> None:
        with in_phase("forward"):
            inside.set()
            until(in_line("capture"))
            with in_phase("load"):
                order.append("load inside the forward")

    def captures() -> None:
        assert inside.wait(30)
        with in_phase("capture"):
            order.append("capture")

    run_in_threads(forwards, captures)
    assert order == ["load inside the forward", "capture"]


def test_a_wait_for_a_phase_has_a_deadline_and_leaves_the_line() -> None:
    holds = _core.Visit("capture", runner="the captor")
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            with sglang_distguard.runner_scope("late", timeout=0.1), in_phase("forward"):
                pass
        except AcquireTimeout as error:
            outcome.append(error)

    run_in_threads(wait)
    (error,) = outcome
    assert isinstance(error, AcquireTimeout)
    assert "'the captor'" in str(error)
    assert error.details["stack"]
    assert holds.leave()
    assert _core.snapshot()["phases"] == []


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="known: load, forward, capture"):
        _core.Visit("lobby", runner=None)


def test_a_visit_ends_once_and_cannot_be_used_again() -> None:
    holds = _core.Visit("capture", runner=None)
    refused: list[str] = []

    def visit() -> None:
        late = _core.Visit("load", runner=None)
        assert late.leave() is True
        assert late.leave() is False
        with pytest.raises(sglang_distguard.DistGuardError) as caught:
            late.try_enter()
        refused.append(str(caught.value))

    run_in_threads(visit)
    assert "ended" in refused[0]
    holds.leave()


def test_sglangs_own_nesting_is_no_deadlock(guard: None, model: Any) -> None:
    """`init_parallel_runtime` initialises the groups in the same call that leads the world."""
    from sglang_distguard.testing import server_args

    before = max((event["seq"] for event in sglang_distguard.snapshot()["events"]), default=-1)
    runner = sglang_distguard.build_runner(server_args(model("qwen3_moe")))
    sglang_distguard.close(runner)
    events = sglang_distguard.snapshot()["events"]
    decisions = [event["decision"] for event in events if event["seq"] > before]
    assert "lead" in decisions
    assert "deadlock" not in decisions
