"""Blocks of several steps that take one turn, and ranks that end or fall silent in a turn."""

from __future__ import annotations

from typing import Any

import pytest
import turn_programs as programs
from conftest import TIMES
from sglang_distguard.testing.ranks import RankRunner

NAMES = ["dense", "experts"]


@pytest.mark.parametrize("mixed", [False, True])
def test_blocks_of_two_runners_in_opposite_order_give_the_bits_of_each_alone(
    repeated: Any, alone: Any, mixed: bool
) -> None:
    for made in repeated(programs.blocks_in_opposite_order, 2, names=NAMES, rounds=25, mixed=mixed):
        assert made == [{name: [alone(name, steps=1)] * 25 for name in NAMES}] * 2


def test_a_block_asks_the_store_as_often_as_one_step(repeated: Any) -> None:
    for counted in repeated(programs.count_requests, 2, generations=8):
        total = {what: sum(it[what] for it in counted) for what in counted[0]}
        # A pair is two steps. How many entries of the log a rank deletes in a turn differs.
        assert 0 < total["block"] <= 0.75 * total["pair"]
        assert total["many"] >= 4 * total["pair"]


@pytest.mark.parametrize(
    "where",
    [
        "user code",
        "an interrupt",
        "a step",
        "a step, caught",
        "an inner block",
        "another's step",
        "another's step, caught",
    ],
)
def test_what_raises_in_a_block_destroys_its_communicators_and_all_ranks_hear_the_cause(
    repeated: Any, alone: Any, where: str
) -> None:
    own = "KeyboardInterrupt" if where == "an interrupt" else "OSError"
    for results in repeated(programs.raise_in_a_block, 2, where=where, on=1):
        assert results[1]["error"]["type"] == own
        assert results[0]["error"]["type"] == "RankFailed"
        (cause,) = results[0]["error"]["details"]["failures"].items()
        assert cause[0] == "1"
        assert cause[1].startswith(own)
        for it in results:
            assert it["again"]["type"] == it["other"]["type"] == "LeaseBroken"
            assert it["after"] == {"half": alone("half")}


def test_a_step_of_another_runner_is_refused_in_a_block_that_another_rank_has_left(
    repeated: Any, alone: Any
) -> None:
    """Its own groups are whole, so that it would wait for that rank."""
    for results in repeated(programs.step_in_an_ended_block, 2, on=1):
        assert results[1]["error"]["type"] == "OSError"
        assert results[0]["error"]["type"] == "RankFailed"
        assert results[0]["error"]["cause"].startswith("LeaseBroken(\"runner 'experts' cannot")
        for it in results:
            assert it["again"]["type"] == "LeaseBroken"
            assert it["after"] == {"half": alone("half")}


def test_a_block_in_a_block_and_the_steps_of_other_runners_are_part_of_its_turn(
    repeated: Any, alone: Any
) -> None:
    dense, experts = (alone(name, steps=1) for name in NAMES)
    for results in repeated(programs.nest_blocks, 2):
        for it in results:
            assert it["made"] == [dense, experts, experts, dense]
            assert it["taken"] == ["turn"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_block_asks_nothing_where_steps_take_no_turns(
    ranks: RankRunner, alone: Any, size: int
) -> None:
    dense, experts = (alone(name, size, steps=1) for name in NAMES)
    for it in ranks.run(programs.blocks_without_turns, size):
        assert it["made"] == [dense, dense, experts]
        assert it["taken"] == []
        assert it["closed"]


def test_builds_and_closes_in_a_block_are_refused_and_the_block_goes_on(
    repeated: Any, alone: Any
) -> None:
    for results in repeated(programs.misuse_blocks, 2):
        for it in results:
            refused = it["refused"]
            assert refused["build"]["type"] == "DistGuardError"
            assert "Build before the block or after it" in refused["build"]["text"]
            for what in ("close", "close another's"):
                assert refused[what]["type"] == "StateInUse"
                assert "Close it after the block" in refused[what]["text"]
            assert refused["no runner"]["type"] == "TypeError"
            assert "not a Linear" in refused["no runner"]["text"]
            assert refused["closed"]["type"] == "DistGuardError"
            dense = alone("dense", steps=1)
            assert it["made"] == [dense, dense, alone("half")]
            assert it["closed"]
            assert it["later"] == {"mixture": alone("mixture")}


@pytest.mark.parametrize("what", ["steps", "steps of another runner", "a block of another runner"])
def test_other_threads_wait_until_a_block_has_ended(repeated: Any, alone: Any, what: str) -> None:
    dense = alone("dense", steps=1)
    second = alone("experts", steps=1) if what.endswith("another runner") else dense
    for results in repeated(programs.second_threads, 2, what=what):
        for it in results:
            assert it["made"] == [dense, dense, second]
            assert it["order"] == ["block", "second"]


def test_threads_that_a_block_has_started_compute_in_its_turn_one_at_a_time(
    repeated: Any, alone: Any
) -> None:
    for results in repeated(programs.threads_of_a_block, 2):
        for it in results:
            assert it["made"] == [alone(name, steps=1) for name in NAMES]
            assert it["refused"]["type"] == it["error"]["type"] == "StateInUse"
            assert it["again"]["type"] == "LeaseBroken"
            assert it["after"] == {"half": alone("half")}


def test_a_task_that_outlives_its_block_takes_turns_of_its_own(repeated: Any, alone: Any) -> None:
    for results in repeated(programs.tasks_of_a_block, 2):
        for it in results:
            assert it["made"] == [alone("dense", steps=1)] * 2
            assert it["taken"] == ["turn", "forward", "sample", "forward", "sample"]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_ends_or_falls_silent_in_a_block_is_named_by_all_threads_of_the_others(
    ranks: RankRunner, alone: Any, how: str
) -> None:
    """gloo notices a killed process by itself; a stopped one gives no signs of life, only."""
    for _ in range(TIMES):
        told = ranks.run(programs.end_a_rank_in_a_block, 2, how=how, on=1, may_die=True)
        assert told[1] is None
        for error in told[0]["heard"]:
            assert error["type"] == "AgreementTimeout"
            assert error["details"]["missing"] == [1]
            assert "gave no sign of life" in error["text"]
        assert told[0]["after"] == {"experts": alone("experts", 1)}


def test_a_rank_that_is_slow_in_a_block_is_not_presumed_dead(repeated: Any, alone: Any) -> None:
    expected = alone("dense", steps=0)
    for results in repeated(programs.be_slow_in_a_block, 2, on=1, deadline=2.0):
        assert results == [{"made": expected, "again": expected}] * 2


def test_a_rank_that_sleeps_in_a_block_hears_from_its_beating_thread_that_another_raised(
    repeated: Any, alone: Any
) -> None:
    for results in repeated(programs.fail_beside_a_wait_that_nothing_ends, 2, on=1):
        assert results[1]["error"]["type"] == "OSError"
        assert results[0]["error"]["type"] == "RankFailed"
        assert results[0]["error"]["details"]["failures"] == {"1": "OSError: no block today"}
        assert results[0]["by"] == "distguard-alive"
        assert results[1]["by"] == "MainThread"
        for it in results:
            assert it["after"] == {"half": alone("half")}
