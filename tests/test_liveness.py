"""Signs of life of ranks: ranks as threads, a real store, no SGLang."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from conftest import TIMES
from forking import in_child
from rank_programs import in_threads
from sglang_distguard import AgreementTimeout, RankFailed, runner_scope
from sglang_distguard.distributed.ranks import agreement, log, reader
from sglang_distguard.distributed.ranks.agreement import turn
from sglang_distguard.distributed.ranks.liveness import THREAD, Liveness
from sglang_distguard.distributed.ranks.log import Ranks
from sglang_distguard.process import fork_and_exit
from sglang_distguard.testing.simulated import serve, simulated

#: Seconds that no wait takes unless it hangs, and after which a rank is silent.
LONG, SHORT = 60.0, 0.5


@pytest.fixture(autouse=True, params=range(TIMES))
def repetition(request: pytest.FixtureRequest) -> None:
    """Repeat every test as often as `make ranks` requests."""


class Flight:
    """Something in flight."""

    def __init__(self, deadline: float = SHORT) -> None:
        self.deadline = deadline
        self.was_looked_at = threading.Event()

    def look(self) -> None:
        self.was_looked_at.set()


@contextmanager
def world(size: int = 2) -> Iterator[list[Ranks]]:
    server = serve()
    ranks = simulated(size, server)
    try:
        yield ranks
    finally:
        for it in ranks:
            it.alive.close(LONG)
        del server  # keeps it alive until here


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for ranks take far longer than until a rank is silent."""
    real = agreement._await
    monkeypatch.setattr(agreement, "_await", lambda ask, stage, _: real(ask, stage, LONG))


def fall_silent(rank: Ranks) -> None:
    """Let ``rank`` beat, and then give no sign of life, as if its process had died."""
    flight = Flight()
    rank.alive.begin(flight)
    assert flight.was_looked_at.wait(LONG)
    rank.alive.close(LONG)


def die_inside(rank: Ranks, leave: threading.Event) -> None:
    """Take the turn of runner a, and give no sign of life there."""
    with (
        suppress(AgreementTimeout),
        runner_scope(agreement_timeout=SHORT),
        turn(rank, "runner a", {}),
    ):
        rank.alive.close(LONG)
        assert leave.wait(LONG)


def outcome(work: Callable[[], Any]) -> Any:
    (ended,) = in_threads([work])
    return ended


def take(it: Ranks, name: str) -> None:
    with runner_scope(agreement_timeout=SHORT), turn(it, name, {}):
        pass


def assert_names_silent(error: Any, rank: int) -> None:
    assert isinstance(error, AgreementTimeout)
    assert error.details["missing"] == [rank]
    assert "gave no sign of life" in str(error)


def beating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.mark.usefixtures("patience")
def test_a_wait_for_a_silent_rank_ends_before_its_deadline_and_so_does_the_next() -> None:
    with world() as ranks:
        fall_silent(ranks[1])
        assert_names_silent(outcome(lambda: take(ranks[0], "runner a")), 1)
        assert_names_silent(outcome(lambda: take(ranks[0], "runner b")), 1)


@pytest.mark.usefixtures("patience")
def test_a_rank_that_beats_is_waited_for() -> None:
    with world() as ranks:
        flight = Flight()
        ranks[1].alive.begin(flight)
        waits = threading.Thread(target=lambda: ended.append(outcome(lambda: take(ranks[0], "a"))))
        ended: list[Any] = []
        waits.start()
        before = ranks[1].alive.beats
        while ranks[1].alive.beats < before + 20:  # there are eight in a deadline
            waits.join(0.01)
        assert waits.is_alive()
        take(ranks[1], "a")
        waits.join()
        assert ended == [None]
        ranks[1].alive.end(flight)


def test_a_rank_that_is_idle_is_missing_at_the_deadline_only() -> None:
    with world() as ranks:
        assert in_threads([lambda it=it: take(it, "runner a") for it in ranks]) == [None, None]
        for thread in beating():
            thread.join(LONG)
        assert ranks[0].store.get("alive/1") == b"off"
        error = outcome(lambda: take(ranks[0], "runner b"))
        assert isinstance(error, AgreementTimeout)
        assert error.details["missing"] == [1]
        assert "within" in str(error)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("raises", [None, ValueError("of a backend")])
def test_a_turn_that_waits_for_a_silent_rank_is_ended_by_another_thread_and_undone_once(
    raises: Any,
) -> None:
    with world() as ranks:
        undone: list[str] = []
        was_undone, leave = threading.Event(), threading.Event()

        def undo(_why: str) -> None:
            undone.append(threading.current_thread().name)
            was_undone.set()

        def stay() -> None:
            how: dict[str, Any] = {"creates": False, "undo": undo}
            with runner_scope(agreement_timeout=SHORT), turn(ranks[0], "runner a", {}, **how):
                assert was_undone.wait(LONG)
                if raises is not None:
                    raise raises

        dying = threading.Thread(target=die_inside, args=(ranks[1], leave))
        dying.start()
        error = outcome(stay)
        leave.set()
        dying.join()
        assert_names_silent(error, 1)
        assert error.__cause__ is raises
        assert undone == [THREAD]


@pytest.mark.usefixtures("patience")
def test_a_rank_that_raised_ends_the_turn_of_one_that_is_inside() -> None:
    with world() as ranks:
        was_undone = threading.Event()

        def stay() -> None:
            how: dict[str, Any] = {"creates": False, "undo": lambda _: was_undone.set()}
            with runner_scope(agreement_timeout=LONG), turn(ranks[0], "runner a", {}, **how):
                assert was_undone.wait(LONG)

        def fail() -> None:
            with runner_scope(agreement_timeout=LONG), turn(ranks[1], "runner a", {}):
                raise OSError("no turn today")

        error, own = in_threads([stay, fail])
        assert isinstance(error, RankFailed)
        assert error.details["failures"] == {1: "OSError: no turn today"}
        assert isinstance(own, OSError)


@pytest.mark.usefixtures("patience")
def test_a_group_is_not_waited_for_when_a_member_is_silent() -> None:
    with world() as ranks:
        leave, meeting = threading.Event(), serve()

        def create() -> None:
            with runner_scope(agreement_timeout=SHORT), turn(ranks[0], "runner a", {}) as ask:
                assert ask.creation is not None
                ask.creation.seconds = LONG
                ask.creation.meet("a group", 2, meeting)

        dying = threading.Thread(target=die_inside, args=(ranks[1], leave))
        dying.start()
        error = outcome(create)
        leave.set()
        dying.join()
        assert_names_silent(error, 1)
        assert "another rank failed before it created group a group" in str(error.__cause__)


def test_a_pause_of_the_listener_counts_for_two_beats() -> None:
    with world() as ranks:
        fall_silent(ranks[1])
        alive = ranks[0].alive
        now = alive._listen(time.monotonic())
        for _ in range(3):
            alive._listen(now - 1000.0)
        (other,) = alive._others.values()
        assert other.silent == 6 * alive._interval


def test_a_rank_that_beats_less_often_is_not_silent_sooner() -> None:
    alive = Liveness(0, 2, None)
    (other,) = alive._others.values()
    for _ in range(16):
        other.hear("1 2.000", 1.0)
    assert (other.silent, alive.silent(SHORT)) == (15.0, {})
    other.hear("1 2.000", 1.0)
    assert alive.silent(SHORT) == {1: 16.0}
    for _ in range(2):
        other.hear("off", 100.0)
    assert alive.silent(SHORT) == {}


def test_leaving_ends_the_beating_thread_and_no_other_begins() -> None:
    with world() as ranks:
        flight = Flight(LONG)
        ranks[0].alive.begin(flight)
        assert flight.was_looked_at.wait(LONG)
        reader.close(ranks[0], LONG)
        assert beating() == []
        ranks[0].alive.begin(Flight())
        assert beating() == []
        assert ranks[0].store.get("alive/0") != b"off"  # something was in flight


def test_a_forked_child_gives_no_signs_of_life() -> None:
    with world() as ranks:
        alive = ranks[0].alive
        with alive._changed:  # as another thread may at the fork
            alive.start_afresh()
            alive.begin(Flight())
        assert beating() == []


def test_a_forked_child_that_exits_writes_nothing_into_its_parents_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def exit_as_a_child() -> int:
        fork_and_exit._at_exit()
        return len(log.opened())

    with world() as ranks:
        key = threading.Event()  # stands for the process group
        monkeypatch.setitem(log._opened, key, ranks[0])  # type: ignore[arg-type]
        waits = threading.Thread(target=outcome, args=(lambda: take(ranks[0], "runner a"),))
        waits.start()
        while not ranks[0].state.is_reading():
            waits.join(0.01)
        assert in_child(exit_as_a_child) == 0
        waits.join()  # it times out, and writes the first entry
        first = ranks[0].store.get("log/0").decode()
        assert "(exit)" not in first
        assert "runner a" in first


def test_a_flight_that_cannot_look_does_not_end_the_signs_of_life() -> None:
    with world() as ranks:
        flight = Flight()
        looks = itertools.count()

        def look() -> None:
            if next(looks) == 0:
                raise RuntimeError("can't start new thread")
            flight.was_looked_at.set()

        flight.look = look  # type: ignore[method-assign]
        ranks[0].alive.begin(flight)
        assert flight.was_looked_at.wait(LONG)


def test_a_thread_that_cannot_be_started_fails_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == THREAD:
            raise RuntimeError("can't start new thread")
        start(thread)

    with world() as ranks:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert in_threads([lambda it=it: take(it, "runner a") for it in ranks]) == [None, None]


def test_a_lost_store_ends_the_beating_thread() -> None:
    server = serve()
    ranks = simulated(2, server)
    flight = Flight()
    ranks[0].alive.begin(flight)
    assert flight.was_looked_at.wait(LONG)
    (thread,) = beating()
    del server
    thread.join(LONG)
    assert not thread.is_alive()
