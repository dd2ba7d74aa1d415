"""An initialiser's error reaches its caller, leaves nothing half-made, and lets a waiter lead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
from sglang_distguard import _core
from sglang_distguard.distributed import coordinators
from sglang_distguard.testing import server_args, steps

Model = Callable[..., Path]


class Injected(Exception):
    """Raised by the failing step."""


@contextmanager
def failing_once(
    owner: object, name: str, *, at_call: int = 1, after: bool = False
) -> Iterator[list[int]]:
    """Let the ``at_call``-th call of ``owner.name`` raise, before or after it did its work."""
    original = getattr(owner, name)
    calls: list[int] = []
    lock = threading.Lock()

    def fail(*args: Any, **kwargs: Any) -> Any:
        with lock:
            calls.append(1)
            number = len(calls)
        if number == at_call and not after:
            raise Injected(f"{name}, call {number}")
        result = original(*args, **kwargs)
        if number == at_call:
            raise Injected(f"{name}, call {number}, after its work")
        return result

    setattr(owner, name, fail)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def _points() -> list[Any]:
    parallel_state = "sglang.srt.distributed.parallel_state"
    bootstrap = "sglang.srt.distributed.bootstrap"
    runner = "sglang.srt.model_executor.model_runner"
    points = [
        ("torch.distributed", "init_process_group", 1, False),
        ("torch.distributed", "init_process_group", 1, True),
        (parallel_state, "init_world_group", 1, False),
        (parallel_state, "init_world_group", 1, True),
        *[(parallel_state, "init_model_parallel_group", call, False) for call in (1, 2, 3)],
        *[(parallel_state, "init_model_parallel_group", call, True) for call in (1, 2, 3)],
        # Device and CPU group of world, tp, pp and self_pp; this also fails between the two.
        *[("torch.distributed", "new_group", call, False) for call in range(1, 9)],
        (bootstrap, "_resolve_backend", 1, False),
        (bootstrap, "_set_all_reduce_flags", 1, True),
        (bootstrap, "_bind_threads_if_cpu", 1, True),
        (bootstrap, "_tag_groups_for_flashinfer_allreduce_only", 1, False),
        (bootstrap, "initialize_dp_attention", 1, False),
        (bootstrap, "initialize_dp_attention", 1, True),
        (bootstrap, "init_dp_gathered_buffer", 1, True),
        (bootstrap, "initialize_layernorm_sp", 1, True),
        (runner, "set_offloader", 1, True),
        (runner, "set_global_expert_location_metadata", 1, True),
        (runner, "set_global_expert_distribution_recorder", 1, True),
        (runner, "create_sampler", 1, False),
        (runner, "load_model_with_memory_saver", 1, True),
        (runner, "build_attention_backends", 1, True),
        (runner, "capture_cuda_graphs", 1, True),
    ]
    return [
        pytest.param(*point, id=f"{point[1]}-{point[2]}-{'after' if point[3] else 'before'}")
        for point in points
    ]


@pytest.mark.parametrize(("module", "name", "call", "after"), _points())
def test_a_failure_at_any_step_leaves_nothing_half_made(
    guard: None, model: Model, module: str, name: str, call: int, after: bool
) -> None:
    import importlib

    args = server_args(model("qwen3_moe"))
    alone = coordinators.default_process_group()
    assert alone is None
    with (
        failing_once(importlib.import_module(module), name, at_call=call, after=after),
        pytest.raises(Injected, match=name),
    ):
        steps.build(args)
    import gc

    gc.collect()
    assert_nothing_half_made()
    runner = steps.build(server_args(model("qwen3_moe")))
    assert (
        steps.generate(runner, steps=1, activate=sglang_distguard.activate).logits.isfinite().all()
    )
    sglang_distguard.close(runner)


def assert_nothing_half_made() -> None:
    """Check that slots are idle or ready, and that torch's groups all belong to ready slots."""
    slots = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
    assert {slot["state"] for slot in slots.values()} <= {"idle", "ready"}
    assert all(slot["holders"] == [] for slot in slots.values())
    world = slots["world"]["state"] == "ready" if "world" in slots else False
    assert (coordinators.default_process_group() is not None) == world
    made = coordinators.process_groups() if world else []
    shared = _core.resource("groups")
    owned: list[Any] = []
    if world:
        owned.append(_core.resource("world").coordinator)
    if shared is not None:
        owned.extend(group for group in shared.values() if group is not None)
    known = {id(g) for c in owned for g in (c.device_group, c.cpu_group)}
    assert {id(group) for group in made} == known
    if shared is None:
        assert set(coordinators.read().values()) == {None}


def test_when_the_leader_fails_a_waiter_leads_and_the_others_join(
    guard: None, model: Model
) -> None:
    from sglang.srt.distributed import parallel_state

    leading, waiting = threading.Event(), threading.Event()
    original = parallel_state.init_model_parallel_group
    failures_before = groups_slot().get("failures", 0)
    first = threading.Lock()

    def fail_first(*args: Any, **kwargs: Any) -> Any:
        if first.acquire(blocking=False):
            leading.set()
            assert waiting.wait(60)
            raise Injected("the first leader")
        return original(*args, **kwargs)

    parallel_state.init_model_parallel_group = fail_first
    results: list[Any] = []

    def build() -> None:
        try:
            results.append(steps.build(server_args(model("gpt2"))))
        except Injected as error:
            results.append(error)

    threads = [threading.Thread(target=build, name=f"builder-{i}") for i in range(3)]
    try:
        for thread in threads:
            thread.start()
        assert leading.wait(60)
        while sum(slot["waiters"] for slot in sglang_distguard.snapshot()["slots"]) < 2:
            assert any(thread.is_alive() for thread in threads)
        waiting.set()
        for thread in threads:
            thread.join()
    finally:
        parallel_state.init_model_parallel_group = original
    failed = [result for result in results if isinstance(result, Injected)]
    built = [result for result in results if not isinstance(result, Injected)]
    assert len(failed) == 1
    assert len(built) == 2
    assert groups_slot()["failures"] == failures_before + 1
    assert len(groups_slot()["holders"]) == 2
    for runner in built:
        sglang_distguard.close(runner)


def groups_slot() -> dict[str, Any]:
    """The slot of the shared groups in ``snapshot()``; empty before its first request."""
    slots: dict[str, Any] = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
    return slots.get("groups", {})


def test_a_missing_checkpoint_reaches_its_caller_and_the_next_build_works(
    guard: None, model: Model, tmp_path: Path
) -> None:
    import shutil

    broken = tmp_path / "gpt2"
    shutil.copytree(model("gpt2"), broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(Exception, match=r"(?i)weight|safetensors|find"):
        steps.build(server_args(broken))
    runner = steps.build(server_args(model("gpt2")))
    sglang_distguard.close(runner)


def test_a_publish_that_fails_leaves_the_context_as_it_was(guard: None, model: Model) -> None:
    from sglang.srt import runtime_context

    runtime_context.publish(server_args(model("gpt2")), role="scheduler")
    before = runtime_context.get_server_args()
    with (
        failing_once(runtime_context, "_validate_parallel"),
        pytest.raises(Injected),
    ):
        runtime_context.publish(
            server_args(model("llama")),
            role="scheduler",
            ranks=runtime_context.SpawnRanks(world_rank=0, gpu_id=0),
        )
    assert runtime_context.get_server_args() is before
