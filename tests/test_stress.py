"""The main test repeated many times, and with 32 runners; takes minutes (`make stress`)."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import sglang_distguard
from conftest import teardown_everything
from sglang_distguard.testing import fleet

pytestmark = pytest.mark.slow
ROUNDS = 50


def one_round(members: list[fleet.Member], repetitions: int) -> list[str]:
    """Build all, let all generate at once, close all, tear down; return the problems."""
    with fleet.bystander() as seen:
        outcomes = fleet.build_all(members)
        problems = [f"{o.member.name}: {o.error!r}" for o in outcomes if o.error is not None]
        problems += [
            f"{o.member.name}: parameters of another dtype"
            for o in outcomes
            if o.runner is not None and fleet.parameter_dtypes(o.runner) != {o.member.dtype}
        ]
        problems += fleet.sharing_problems(outcomes, sglang_distguard.activate)
        fleet.generate_all(outcomes, repetitions, sglang_distguard.activate)
    problems += [f"{o.member.name}: {problem}" for o in outcomes for problem in o.problems]
    for outcome in outcomes:
        if outcome.runner is not None:
            sglang_distguard.close(outcome.runner)
    del outcomes
    gc.collect()
    teardown_everything()
    return problems + seen


@pytest.mark.timeout(3600)
def test_fifty_rounds_in_a_row_without_one_wrong_bit(sglang: None, cache: Path) -> None:
    members = fleet.members(cache)
    sglang_distguard.install()
    start = time.perf_counter()
    for number in range(1, ROUNDS + 1):
        begun = time.perf_counter()
        assert one_round(members, 3) == []
        took = time.perf_counter() - begun
        print(
            f"round {number:2}/{ROUNDS}: 8 runners built and 3 x 8 generations right, {took:.1f} s"
        )
    total = time.perf_counter() - start
    print(
        f"{ROUNDS} rounds, {ROUNDS * 8} runners, {ROUNDS * 24} generations, {total:.0f} s, 0 wrong"
    )
    sglang_distguard.uninstall()


@pytest.mark.timeout(1800)
def test_thirty_two_runners_at_once(sglang: None, cache: Path) -> None:
    members = fleet.members(cache, repeat=4)
    assert len(members) == 32
    sglang_distguard.install()
    begun = time.perf_counter()
    assert one_round(members, 2) == []
    took = time.perf_counter() - begun
    print(f"32 runners built at once, 2 x 32 generations at once, {took:.1f} s, 0 wrong")
    sglang_distguard.uninstall()
