"""Leases of runners: held until a runner is closed or collected, and respected by teardowns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import sglang_distguard
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


def test_a_closed_runner_raises_and_closing_twice_is_harmless(guard: None, model: Model) -> None:
    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="short-lived")
    assert sglang_distguard.close(runner) is True
    assert sglang_distguard.close(runner) is False
    with pytest.raises(sglang_distguard.DistGuardError, match="'short-lived' is closed"):
        runner.forward(forward_batch=None)  # type: ignore[arg-type]


def test_of_many_threads_that_close_a_runner_one_releases_its_leases(
    guard: None, model: Model
) -> None:
    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="closed by many")
    start, firsts = threading.Barrier(8), []

    def close() -> None:
        start.wait()
        firsts.append(sglang_distguard.close(runner))

    threads = [threading.Thread(target=close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(firsts) == [False] * 7 + [True]
    assert all(slot["holders"] == [] for slot in sglang_distguard.snapshot()["slots"])


def test_a_collected_runner_releases_its_leases(guard: None, model: Model) -> None:
    import gc

    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="forgotten")
    held = [slot["holders"] for slot in sglang_distguard.snapshot()["slots"]]
    assert any(holder["name"] == "forgotten" for holders in held for holder in holders)
    del runner
    gc.collect()
    held = [slot["holders"] for slot in sglang_distguard.snapshot()["slots"]]
    assert all(holders == [] for holders in held)


def test_groups_and_world_are_not_torn_down_under_a_runner(guard: None, model: Model) -> None:
    from sglang.srt.distributed import parallel_state

    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="holder")
    for destroy in (
        parallel_state.destroy_model_parallel,
        parallel_state.destroy_distributed_environment,
    ):
        with pytest.raises(sglang_distguard.StateInUse, match="'holder'"):
            destroy()
    with pytest.raises(sglang_distguard.StateInUse, match="'holder'"):
        sglang_distguard.reset()
    sglang_distguard.close(runner)


def test_after_a_teardown_everything_is_built_again_with_a_higher_generation(
    guard: None, model: Model
) -> None:
    from conftest import teardown_everything

    generations = []
    for _ in range(2):
        runner = sglang_distguard.build_runner(server_args(model("gpt2")))
        slots = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
        generations.append((slots["world"]["generation"], slots["groups"]["generation"]))
        sglang_distguard.close(runner)
        teardown_everything()
    assert generations[1] == (generations[0][0] + 1, generations[0][1] + 1)


def test_uninstall_is_refused_while_a_runner_needs_its_own_scope(guard: None, model: Model) -> None:
    runners = [
        sglang_distguard.build_runner(server_args(model("gpt2")), name=name)
        for name in ("first", "second")
    ]
    with pytest.raises(sglang_distguard.StateInUse, match="second"):
        sglang_distguard.uninstall()
    assert sglang_distguard.is_installed()
    for runner in runners:
        sglang_distguard.close(runner)


def test_a_caller_that_may_not_reuse_is_refused_and_the_error_names_the_holder(
    guard: None, model: Model
) -> None:
    runner = sglang_distguard.build_runner(server_args(model("gpt2")), name="first")
    with (
        sglang_distguard.runner_scope("second", reuse=False),
        pytest.raises(sglang_distguard.StateInUse, match="'first'"),
    ):
        sglang_distguard.build_runner(server_args(model("gpt2")))
    sglang_distguard.close(runner)


def test_groups_made_before_install_are_adopted_and_shared(sglang: None, model: Model) -> None:
    from conftest import teardown_everything
    from sglang_distguard.testing import bit_equal, fleet, steps

    plain = steps.build(server_args(model("gpt2")))
    sglang_distguard.install()
    runner = sglang_distguard.build_runner(server_args(model("llama")), name="guest")
    slots = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
    assert (slots["world"]["origin"], slots["groups"]["origin"]) == ("adopted", "adopted")
    (llama,) = fleet.members(Path(__file__).parent.parent / ".cache", [("llama", "float32")])
    assert bit_equal(
        steps.generate(runner, activate=sglang_distguard.activate).logits, llama.alone.logits
    )
    sglang_distguard.close(runner)
    from sglang.srt.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    import torch

    assert torch.distributed.is_initialized()  # an adopted world is never destroyed
    sglang_distguard.uninstall()
    del plain
    torch.distributed.destroy_process_group()
    teardown_everything()
