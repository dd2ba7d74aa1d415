"""Two engines of other models answer every method at once as `sgl.Engine` does alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import engine_calls
import pytest
from conftest import guarded
from engine_calls import alone, at_once, checkpoint, opened
from sglang_distguard import Engine, NotSupported
from sglang_distguard.engines.refusals import REFUSED, REFUSED_ON_CPU

KINDS = ("llama", "qwen3_moe")
SUBJECTS = ("scored", "sessions", "saved", "updated", "without_lora")


def given(kind: str) -> engine_calls.Given:
    weights = {"own": str(checkpoint(kind)), "other": str(checkpoint(kind, seed=1))}
    return {name: weights if name == "updated" else {} for name in SUBJECTS}


@pytest.fixture(scope="module")
def expected(sglang: None) -> list[dict[str, Any]]:
    return [alone(checkpoint(kind), given(kind)) for kind in KINDS]


@pytest.fixture(scope="module")
def engines(sglang: None) -> Iterator[list[Engine]]:
    with guarded(), opened(*map(checkpoint, KINDS)) as made:
        yield made


@pytest.mark.parametrize("subject", SUBJECTS)
def test_two_engines_answer_at_once_as_each_alone(
    engines: list[Engine], expected: list[dict[str, Any]], subject: str
) -> None:
    found = at_once(engines, [{subject: given(kind)[subject]} for kind in KINDS])
    assert found == [{subject: it[subject]} for it in expected]


def test_answers_that_are_compared_are_not_all_the_same(expected: list[dict[str, Any]]) -> None:
    one, other = expected
    for subject in ("scored", "saved", "updated"):
        assert one[subject] != other[subject]
    for it in expected:
        assert it["updated"]["new"] != it["updated"]["old"] == it["updated"]["before"]
        assert len(it["saved"]["shards 0"]) == 1
        assert it["saved"]["shards 0"] == it["saved"]["shards 1"]
        assert it["sessions"]["turn 1"][1] > len(engine_calls.PROMPTS[1])


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_what_cannot_be_in_one_process_is_refused_by_name(
    engines: list[Engine], method: str
) -> None:
    with pytest.raises(NotSupported, match=f"Engine.{method} is not supported: {REFUSED[method]}"):
        getattr(engines[0], method)()


@pytest.mark.parametrize("method", sorted(REFUSED_ON_CPU))
def test_memory_on_a_cpu_is_not_released(engines: list[Engine], method: str) -> None:
    with pytest.raises(NotSupported, match=f"Engine.{method} is not supported on a CPU: memory"):
        getattr(engines[0], method)()
    assert engine_calls.tokens(engines[0])
