"""What ranks agree on before they create anything: ranks as threads, a real store, no SGLang."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import pytest
from conftest import TIMES
from rank_programs import in_threads
from sglang_distguard import (
    AgreementTimeout,
    AmbiguousBuild,
    RankFailed,
    RanksDisagree,
    StoreLost,
    runner_scope,
)
from sglang_distguard.ranks import agreement
from sglang_distguard.ranks.agreement import turn
from sglang_distguard.ranks.world import Ranks
from sglang_distguard.testing.simulated import serve, simulated

#: Seconds that no test needs unless something hangs, and seconds for those that must time out.
LONG, SHORT = 20.0, 0.5


@pytest.fixture(autouse=True, params=range(TIMES))
def repetition(request: pytest.FixtureRequest) -> None:
    """All of these as often as `make ranks` says."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    with runner_scope(agreement_timeout=seconds):
        yield


@contextmanager
def world(size: int) -> Iterator[list[Ranks]]:
    server = serve()
    yield simulated(size, server)
    del server  # until here it lives


def on_ranks(ranks: Sequence[Ranks], work: Callable[[Ranks], Any], seconds: float = LONG) -> Any:
    """What ``work`` returned or raised on every rank."""

    def run(it: Ranks) -> Any:
        with deadline(seconds):
            return work(it)

    return in_threads([lambda it=it: run(it) for it in ranks])


def take(it: Ranks, name: str, spec: Optional[dict[str, Any]] = None) -> int:
    with turn(it, name, spec or {}) as ask:
        return ask.round


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "distguard-ranks"]


@pytest.mark.parametrize("size", [2, 4])
def test_turns_come_in_one_order_on_all_ranks_whatever_order_they_ask_in(size: int) -> None:
    names = ["a", "b", "c", "d"]
    orders = list(itertools.permutations(names))
    with world(size) as ranks:
        taken: dict[int, list[str]] = {it.rank: [] for it in ranks}

        def take_all(it: Ranks) -> None:
            order = orders[it.rank * 7 % len(orders)]

            def one(name: str) -> None:
                with deadline(LONG), turn(it, name, {}):
                    taken[it.rank].append(f"{name} begins")
                    taken[it.rank].append(f"{name} ends")

            assert in_threads([lambda n=n: one(n) for n in order]) == [None] * len(names)

        assert on_ranks(ranks, take_all) == [None] * size
    assert all(it == taken[0] for it in taken.values())
    # One after another, each from its beginning to its end.
    for begins, ends in zip(taken[0][::2], taken[0][1::2], strict=True):
        assert (begins[0], ends[2:]) == (ends[0], "ends")
    assert sorted(it[0] for it in taken[0][::2]) == names


def test_without_agreeing_the_order_differs_between_ranks() -> None:
    """What the one above would find if nobody agreed."""
    taken: list[list[str]] = [[], []]
    gates = {name: threading.Event() for name in "ab"}

    def one(rank: int, name: str, after: Optional[str]) -> None:
        if after is not None:
            gates[after].wait()
        taken[rank].append(name)
        gates[name].set()

    in_threads([lambda: one(0, "a", None), lambda: one(0, "b", "a")])
    for gate in gates.values():
        gate.clear()
    in_threads([lambda: one(1, "a", "b"), lambda: one(1, "b", None)])
    assert taken[0] != taken[1]


def test_a_disagreement_names_the_fields_and_the_values_of_every_rank() -> None:
    with world(3) as ranks:
        specs = [{"tp": 2, "model": "m"}, {"tp": 2, "model": "m"}, {"tp": 4, "model": "m"}]
        errors = on_ranks(ranks, lambda it: take(it, "runner a", specs[it.rank]))
        for error in errors:
            assert isinstance(error, RanksDisagree)
            assert isinstance(error, ValueError)
            assert error.details["fields"] == {"tp": {0: 2, 1: 2, 2: 4}}
            assert "tp: 2 on ranks 0, 1, 4 on rank 2" in str(error)
        assert on_ranks(ranks, lambda it: take(it, "runner a", specs[0])) == [1, 1, 1]


def test_a_rank_that_never_comes_is_named_and_gets_the_same_error_when_it_comes() -> None:
    with world(3) as ranks:
        errors = on_ranks(ranks[:2], lambda it: take(it, "runner a"), SHORT)
        for error in errors:
            assert isinstance(error, AgreementTimeout)
            assert isinstance(error, TimeoutError)
            assert error.details["missing"] == [2]
            assert "rank 2 did not ask for it" in str(error)
        (late,) = on_ranks(ranks[2:], lambda it: take(it, "runner a"))
        assert isinstance(late, AgreementTimeout)
        assert late.details["missing"] == [2]
        assert on_ranks(ranks, lambda it: take(it, "runner a")) == [1, 1, 1]


def test_a_rank_that_fails_in_its_turn_is_named_on_the_others_and_the_next_goes_on() -> None:
    with world(3) as ranks:

        def fail_on_one(it: Ranks) -> None:
            with turn(it, "runner a", {}):
                if it.rank == 1:
                    raise MemoryError("no room")

        errors = on_ranks(ranks, fail_on_one)
        assert isinstance(errors[1], MemoryError)
        for error in (errors[0], errors[2]):
            assert isinstance(error, RankFailed)
            assert error.details["failures"] == {1: "MemoryError: no room"}
        assert on_ranks(ranks, lambda it: take(it, "runner b")) == [0, 0, 0]
        assert on_ranks(ranks, lambda it: take(it, "runner a")) == [1, 1, 1]


def test_an_interrupt_while_asking_ends_the_wait_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world(2) as ranks:
        real = agreement._await

        def interrupted(ask: agreement.Ask, stage: str, timeout: float) -> None:
            if ask.ranks.rank == 0 and ask.round == 0:
                raise KeyboardInterrupt
            real(ask, stage, timeout)

        monkeypatch.setattr(agreement, "_await", interrupted)

        def attempt(it: Ranks) -> Any:
            try:
                return take(it, "runner a")
            except BaseException as error:
                return error

        first, second = on_ranks(ranks, attempt)
        assert isinstance(first, KeyboardInterrupt)
        assert isinstance(second, RankFailed)
        assert second.details["failures"] == {0: "KeyboardInterrupt: "}
        assert on_ranks(ranks, attempt) == [1, 1]


def test_two_threads_of_one_rank_under_one_name_are_refused_at_once() -> None:
    with world(2) as ranks:
        inside, leave = threading.Event(), threading.Event()

        def hold(it: Ranks) -> None:
            with turn(it, "runner a", {}):
                inside.set()
                leave.wait(LONG)

        first = threading.Thread(target=on_ranks, args=(ranks, hold))
        first.start()
        assert inside.wait(LONG)
        errors = on_ranks(ranks, lambda it: take(it, "runner a"))
        for error in errors:
            assert isinstance(error, AmbiguousBuild)
            assert isinstance(error, ValueError)
            assert "its own name" in str(error)
        leave.set()
        first.join()
        assert on_ranks(ranks, lambda it: take(it, "runner a")) == [1, 1]


def test_a_store_that_is_gone_is_said_to_be_so() -> None:
    server = serve()
    ranks = simulated(2, server)
    assert on_ranks(ranks, lambda it: take(it, "runner a")) == [0, 0]
    del server
    for error in on_ranks(ranks, lambda it: take(it, "runner a")):
        assert isinstance(error, StoreLost)
        assert isinstance(error, ConnectionError)
        assert "rank 0's process" in str(error)


def test_nobody_reads_the_log_when_nobody_waits() -> None:
    with world(2) as ranks:
        assert on_ranks(ranks, lambda it: take(it, "runner a")) == [0, 0]
        for thread in readers():
            thread.join(LONG)
        assert readers() == []
        assert not any(it.state.is_reading() for it in ranks)


def test_leaving_ends_a_reader_that_sleeps_in_the_store() -> None:
    with world(2) as ranks:
        waits = threading.Thread(target=on_ranks, args=(ranks[:1], lambda it: take(it, "runner a")))
        waits.start()
        while not ranks[0].state.is_reading():
            waits.join(0.01)
        agreement.leave(ranks[0], LONG)
        assert readers() == []
        waits.join()


def test_what_ranks_told_does_not_stay_in_the_store() -> None:
    with world(2) as ranks:
        counts = []
        for _ in range(3):
            on_ranks(ranks, lambda it: take(it, "runner a"))
            counts.append(ranks[0].store.num_keys())
        # An entry of the log for the ask, and one for the turn; reports and counters are gone.
        assert [counts[1] - counts[0], counts[2] - counts[1]] == [2, 2]


def test_a_turn_inside_a_turn_is_a_part_of_it() -> None:
    with world(2) as ranks:

        def nested(it: Ranks) -> bool:
            with turn(it, "runner a", {}) as outer, turn(it, "groups", {}) as inner:
                return inner is outer

        assert on_ranks(ranks, nested) == [True, True]


def test_the_environment_and_the_scope_set_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_distguard import settings

    monkeypatch.setenv("SGLANG_DISTGUARD_AGREEMENT_TIMEOUT", "7")
    assert settings.choose(again=False).agreement_timeout == 7.0
    assert settings.choose(again=False, agreement_timeout=3).agreement_timeout == 3.0
    with deadline(2):
        assert settings.current().agreement_timeout == 2.0
