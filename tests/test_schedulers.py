"""Several of SGLang's own schedulers, each in a thread of one process, answer as each alone does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import manager_programs
import pytest
from interpreters import facts_of

_HOW = {"event loop": (0, 1, 2), "process function": (1, 0)}


@pytest.fixture(scope="module")
def alone(cache: Path) -> list[list[list[int]]]:
    """The answers of each scheduler of plain SGLang, alone in its process."""
    numbers = range(len(manager_programs.MEMBERS))
    return [facts_of(f"manager_programs.alone(CACHE, {number})") for number in numbers]


@pytest.fixture(scope="module", params=_HOW)
def served(request: pytest.FixtureRequest, cache: Path) -> tuple[tuple[int, ...], dict[str, Any]]:
    """What happened with schedulers in threads: which ones, and the facts."""
    how = request.param
    return _HOW[how], facts_of(f"manager_programs.together(CACHE, {how!r}, {_HOW[how]})")


Served = tuple[tuple[int, ...], dict[str, Any]]


def test_schedulers_in_threads_answer_as_each_alone(
    served: Served, alone: list[list[list[int]]]
) -> None:
    numbers, facts = served
    expected = [alone[number] for number in numbers]
    assert facts["answers"] == expected
    assert facts["answers again"] == expected  # from the prefix cache


def test_the_end_of_one_scheduler_leaves_the_others_serving(
    served: Served, alone: list[list[list[int]]]
) -> None:
    numbers, facts = served
    assert facts["answers when one has ended"] == [alone[number] for number in numbers[1:]]


def test_schedulers_change_nothing_that_belongs_to_their_host(served: Served) -> None:
    _, facts = served
    before, after = facts["settings"]
    assert after == {**before, "world": True}  # which `teardown` destroys


def test_nothing_is_left_of_a_closed_scheduler(served: Served) -> None:
    _, facts = served
    assert facts["holders"] == [[] for _ in facts["holders"]]
    before, after = facts["process"]
    assert after["threads"] == before["threads"]
    assert after["files"] == before["files"]


def test_a_scheduler_that_is_dropped_is_freed_with_its_threads_and_sockets(
    served: Served,
) -> None:
    _, facts = served
    is_freed, after = facts["dropped"]
    assert is_freed
    assert after == facts["process"][0]


def test_a_scheduler_whose_loop_is_busy_is_closed_by_force_only(cache: Path) -> None:
    facts = facts_of("manager_programs.closing(CACHE)")
    inside, late = facts["errors"]
    assert "in a thread that is in its run_event_loop()" in inside
    assert "still in run_event_loop() in thread scheduler" in late
    assert facts["alive"]
    assert facts["forced"]
    assert facts["holders"] == [[] for _ in facts["holders"]]
    assert facts["ended"] == [False, "None"]
    assert facts["afterwards"].endswith("is closed; build a new one")


def test_without_the_guard_a_second_scheduler_is_refused(cache: Path) -> None:
    first, second = facts_of("manager_programs.without_the_guard(CACHE)")["errors"]
    assert first == "None"
    assert "ran twice" in second
