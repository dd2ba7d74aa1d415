"""Agreement of ranks before they create anything: ranks as threads, a real store, no SGLang."""

from __future__ import annotations

import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
from sglang_distguard.distributed.ranks import agreement, reader
from sglang_distguard.distributed.ranks.agreement import turn
from sglang_distguard.distributed.ranks.ask import Ask
from sglang_distguard.distributed.ranks.creation import Creation, NotTogether
from sglang_distguard.distributed.ranks.log import Ranks
from sglang_distguard.sync import waiting
from sglang_distguard.testing.simulated import serve, simulated

#: Seconds that no wait takes unless it hangs, and seconds for waits that must time out.
LONG, SHORT = 20.0, 0.5
#: Seconds by which no two threads that start together arrive apart on a busy machine.
APART = 5.0


@pytest.fixture(autouse=True, params=range(TIMES))
def repetition(request: pytest.FixtureRequest) -> None:
    """Repeat every test as often as `make ranks` requests."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    with runner_scope(agreement_timeout=seconds):
        yield


@contextmanager
def world(size: int) -> Iterator[list[Ranks]]:
    server = serve()
    yield simulated(size, server)
    del server  # keeps it alive until here


def on_ranks(ranks: Sequence[Ranks], work: Callable[[Ranks], Any], seconds: float = LONG) -> Any:
    """What ``work`` returned or raised on every rank."""

    def run(it: Ranks) -> Any:
        with deadline(seconds):
            return work(it)

    return in_threads([lambda it=it: run(it) for it in ranks])


def take(it: Ranks, name: str, spec: Optional[dict[str, Any]] = None, *, keep: bool = False) -> int:
    with turn(it, name, spec or {}, keep=keep) as ask:
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
        errors = on_ranks(ranks[:2], lambda it: take(it, "runner a"), APART)
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
                    raise MemoryError("no memory")

        errors = on_ranks(ranks, fail_on_one)
        assert isinstance(errors[1], MemoryError)
        for error in (errors[0], errors[2]):
            assert isinstance(error, RankFailed)
            assert error.details["failures"] == {1: "MemoryError: no memory"}
        assert on_ranks(ranks, lambda it: take(it, "runner b")) == [0, 0, 0]
        assert on_ranks(ranks, lambda it: take(it, "runner a")) == [1, 1, 1]


@pytest.mark.parametrize("stage", ["ask", "begin", "turn", "build"])
def test_an_interrupt_in_any_wait_ends_that_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with world(2) as ranks:
        real = waiting.until
        other_waits = threading.Event()

        def interrupted(attempt: Any, waits: Any, **kwargs: Any) -> Any:
            if (waits._ask.round, waits._stage) == (0, stage):
                if waits._ask.ranks.rank == 0:
                    assert other_waits.wait(LONG)
                    raise KeyboardInterrupt
                other_waits.set()
            return real(attempt, waits, **kwargs)

        monkeypatch.setattr(waiting, "until", interrupted)

        def attempt(it: Ranks) -> Any:
            try:
                with agreement.building():
                    number = take(it, "runner a", keep=True)
                    agreement.built()
                    return number
            except BaseException as error:
                return error

        first, second = on_ranks(ranks, attempt)
        assert isinstance(first, KeyboardInterrupt)
        if stage == "build":  # all ranks had reported completion, so rank 1 has it
            assert second == 0
        else:
            assert isinstance(second, RankFailed)
            assert second.details["failures"] == {0: "KeyboardInterrupt: "}
        assert on_ranks(ranks, attempt) == [1, 1]


def test_an_interrupt_between_two_stages_of_a_turn_ends_it_on_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Ask.leave_turn

    def interrupted(ask: Ask) -> None:
        if (ask.ranks.rank, ask.round) == (0, 0):
            raise KeyboardInterrupt
        real(ask)

    def attempt(it: Ranks) -> Any:
        try:
            return take(it, "runner a")
        except BaseException as error:
            return error

    monkeypatch.setattr(Ask, "leave_turn", interrupted)
    with world(2) as ranks:
        first, second = on_ranks(ranks, attempt)
        assert isinstance(first, KeyboardInterrupt)
        assert isinstance(second, RankFailed)
        assert second.details["failures"] == {0: "KeyboardInterrupt: "}
        assert on_ranks(ranks, attempt) == [1, 1]


def test_a_wait_behind_a_long_turn_times_out_on_all_ranks_and_later_turns_work() -> None:
    with world(2) as ranks:
        inside, leave = threading.Semaphore(0), threading.Event()

        def hold(it: Ranks) -> None:
            with turn(it, "runner a", {}):
                inside.release()
                assert leave.wait(LONG)

        first = threading.Thread(target=on_ranks, args=(ranks, hold))
        first.start()
        for _ in ranks:
            assert inside.acquire(timeout=LONG)

        def queue(it: Ranks) -> None:
            with runner_scope(timeout=SHORT):
                take(it, "runner b")

        for error in on_ranks(ranks, queue):
            assert isinstance(error, AgreementTimeout)
            assert error.details["holder"] == "runner a"
            assert "because runner a has it" in str(error)
        leave.set()
        first.join()
        assert on_ranks(ranks, lambda it: take(it, "runner c")) == [0, 0]
        assert on_ranks(ranks, lambda it: take(it, "runner b")) == [1, 1]


def test_a_reader_that_cannot_be_started_fails_one_ask_and_not_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with world(1) as (lonely,):

        def start(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start"):
                take(lonely, "runner a")
        assert not lonely.state.is_reading()
        assert take(lonely, "runner b") == 0


def test_a_context_copied_in_a_turn_is_not_in_it_when_it_is_over() -> None:
    with world(1) as (it,):
        with turn(it, "runner a", {}):
            copied = contextvars.copy_context()
            assert copied.run(agreement.has_turn)
        assert not copied.run(agreement.has_turn)
        assert copied.run(take, it, "runner a") == 1


def test_members_of_a_group_do_not_wait_longer_than_they_may_for_one_that_does_not_come() -> None:
    server = serve()
    creation = Creation(SHORT, "prefix ", server)
    for _ in range(2):  # a member that comes again is not counted twice
        with pytest.raises(NotTogether, match="timed out"):
            creation.meet("prefix 0", 2, server)
    both = [Creation(LONG, "prefix ", it) for it in (server, server.clone())]
    for _ in range(2):  # the store may outlive a successful meeting
        assert (
            in_threads([lambda it=it: it.meet("prefix 0", 2, it.store) for it in both])
            == [None] * 2
        )
    creation.fail()
    with pytest.raises(NotTogether, match="another rank failed"):
        both[0].meet("prefix 1", 2, server)


def test_a_member_that_is_interrupted_on_its_way_to_a_group_is_not_waited_for() -> None:
    class Interrupted(Creation):
        def _has_failed(self) -> bool:
            waits.set()
            others_wait.wait(LONG)
            raise KeyboardInterrupt

    waits, others_wait = threading.Event(), threading.Event()
    server = serve()
    interrupted, other = Interrupted(LONG, "p", server), Creation(LONG, "p", server.clone())

    def come() -> None:
        with pytest.raises(KeyboardInterrupt):
            interrupted.meet("p 0", 3, interrupted.store)

    def wait() -> None:
        assert waits.wait(LONG)
        others_wait.set()
        other.meet("p 0", 3, other.store)

    assert [type(it) for it in in_threads([come, wait])] == [type(None), NotTogether]
    late = Creation(SHORT, "p", server)
    with pytest.raises(NotTogether):  # it is not counted as the one that has left
        late.meet("p 0", 3, server)


def test_a_rank_enters_no_turn_before_it_has_left_the_one_that_others_aborted() -> None:
    with world(2) as ranks:
        inside, leave = threading.Event(), threading.Event()
        undone: list[str] = []

        def stay(it: Ranks) -> None:
            with deadline(LONG), turn(it, "runner a", {}, undo=lambda _: undone.append("a")):
                inside.set()
                assert leave.wait(LONG)

        def time_out(it: Ranks) -> None:
            with deadline(SHORT):
                take(it, "runner a")

        def follow(it: Ranks) -> list[str]:
            assert inside.wait(LONG)
            with deadline(LONG), turn(it, "runner b", {}):
                return list(undone)

        def watch() -> tuple[str, str]:
            state = ranks[0].state
            while state.turn() != ("runner b", 0):
                state.wait("runner b", 0, "turn", 0.1)
            standing = state.stands("runner b", 0, "begin")[0]
            leave.set()
            return standing, state.stands("runner a", 0, "turn")[0]

        works = [lambda: stay(ranks[0]), lambda: time_out(ranks[1]), watch]
        works += [lambda it=it: follow(it) for it in ranks]
        stayed, timed_out, watched, first, _ = in_threads(works)
    assert isinstance(stayed, AgreementTimeout)
    assert isinstance(timed_out, AgreementTimeout)
    assert watched == ("open", "failed")
    assert first == ["a"]


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


def test_a_store_that_is_gone_raises_store_lost() -> None:
    server = serve()
    ranks = simulated(2, server)
    assert on_ranks(ranks, lambda it: take(it, "runner a")) == [0, 0]
    del server
    for error in on_ranks(ranks, lambda it: take(it, "runner a")):
        assert isinstance(error, StoreLost)
        assert isinstance(error, ConnectionError)
        assert "rank 0's process" in str(error)


def test_no_thread_reads_the_log_when_no_rank_waits() -> None:
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
        reader.close(ranks[0], LONG)
        assert readers() == []
        waits.join()


class Delayed:
    """A store in which the first entry about ``name`` is written only when ``go_on`` is set."""

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name = store, name
        self.is_there, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def compare_set(self, key: str, before: str, text: str) -> bytes:
        if key.startswith("log/") and f'"{self._name}"' in text and not self.is_there.is_set():
            self.is_there.set()
            self.go_on.wait()
        written: bytes = self._store.compare_set(key, before, text)
        return written


def test_an_entry_that_comes_where_others_were_read_and_deleted_is_written_again() -> None:
    with world(2) as made:
        # The rank that reports last writes the entry; all entries go through these stores.
        delays = [Delayed(it.store, "slow") for it in made]
        ranks = [replace(it, store=delay) for it, delay in zip(made, delays, strict=True)]
        slow = threading.Thread(
            target=lambda: slowly.extend(on_ranks(ranks, lambda it: take(it, "slow")))
        )
        slowly: list[Any] = []
        slow.start()
        while not any(it.is_there.is_set() for it in delays):
            slow.join(0.01)
        store = ranks[0].store
        for _ in range(50):
            assert None not in on_ranks(ranks, lambda it: take(it, "quick"))
            for it in ranks:
                it.tidy()  # a reader that goes on reading, for "slow", leaves a few keys
            if not store.check(["log/0"]):  # the rank that wrote it reported last in a later stage
                break
        assert not store.check(["log/0"])
        for delay in delays:
            delay.go_on.set()
        slow.join()
        assert slowly == [0, 0]
        assert on_ranks(ranks, lambda it: take(it, "slow")) == [1, 1]


def test_the_store_does_not_grow_with_turns() -> None:
    with world(2) as ranks:

        def after(turns: int) -> int:
            for _ in range(turns):
                on_ranks(ranks, lambda it: take(it, "runner a"))
            return ranks[0].store.num_keys()

        # A turn writes six entries or more. Which rank deletes an entry differs; it does so in its
        # own turn. Entries of one or two turns may exist at any moment, but fewer than one per
        # turn remain.
        first = after(5)
        assert after(20) - first < 20


def test_a_turn_inside_a_turn_is_a_part_of_it() -> None:
    with world(2) as ranks:

        def nested(it: Ranks) -> bool:
            with turn(it, "runner a", {}) as outer, turn(it, "groups", {}) as inner:
                return inner is outer

        assert on_ranks(ranks, nested) == [True, True]


def test_the_environment_and_the_scope_set_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_distguard.config import settings

    monkeypatch.setenv("SGLANG_DISTGUARD_AGREEMENT_TIMEOUT", "7")
    assert settings.choose(again=False).agreement_timeout == 7.0
    assert settings.choose(again=False, agreement_timeout=3).agreement_timeout == 3.0
    with deadline(2):
        assert settings.current().agreement_timeout == 2.0
