"""A runner's own stream: where steps are ordered with it. The stream itself needs a GPU (verify/gpu_streams.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from registry_calls import inside
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.testing import server_args, steps


class Order:
    """Notes when a step begins and ends, in the place of a ``RunnerStream``."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, list[str]]] = []
        self.error: Exception | None = None

    def begin(self) -> int:
        if self.error is not None:
            raise self.error
        self.seen.append(("begin", None, inside()))
        return len(self.seen)

    def end(self, begun: Any) -> None:
        self.seen.append(("end", begun, inside()))

    def take(self) -> str:
        self.seen.append(("take", None, inside()))
        return "taken"

    def release(self, taken: Any) -> None:
        self.seen.append(("give back", taken, inside()))


@pytest.fixture
def runner(guard: None, model: Callable[[str], Path]) -> Any:
    with sglang_distguard.runner_scope(streams="own"):
        return sglang_distguard.build_runner(server_args(model("gpt2")))


def test_a_runner_on_a_cpu_has_none(runner: Any) -> None:
    assert handle_of(runner).stream is None
    assert sglang_distguard.snapshot()["streams"] == "share"
    sglang_distguard.close(runner)


def test_each_step_is_ordered_within_its_phase(runner: Any) -> None:
    order = Order()
    expected = steps.generate(runner, steps=1).tokens
    handle_of(runner).stream = order
    with sglang_distguard.activate(runner) as same:
        assert same is runner
        assert steps.generate(runner, steps=1).tokens == expected
    first, *among, last = order.seen
    assert first == ("take", None, [])
    assert last == ("give back", "taken", [])
    assert [it[0] for it in among] == ["begin", "end"] * (len(among) // 2)
    assert {tuple(it[2]) for it in among} == {("phase:forward",)}
    # What `begin` returned comes back, and a forward's own steps are not ordered again.
    assert [it[1] for it in among[1::2]] == list(range(2, len(among) + 1, 2))
    assert len(among) == 2 * 4  # a forward and a sample for each of two tokens
    handle_of(runner).stream = None
    sglang_distguard.close(runner)


def test_a_step_that_cannot_be_ordered_leaves_nothing_entered(runner: Any) -> None:
    order = Order()
    order.error = RuntimeError("the card is lost")
    handle_of(runner).stream = order
    with pytest.raises(RuntimeError, match="the card is lost"):
        runner.check_weights("snapshot", role="target")
    assert inside() == []
    order.error = None
    handle_of(runner).stream = None
    sglang_distguard.close(runner)
