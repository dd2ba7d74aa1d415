"""torch.compile through SGLang's context accessors: no graph breaks, each runner's own values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
import torch
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


class Reads(torch.nn.Module):
    """Computes with values that SGLang's layers read: a width, a runner's setting, a flag."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from sglang.srt.runtime_context import get_exec, get_forward, get_parallel

        y = x * get_exec().graph.torch_compile_max_bs + get_parallel().tp_size
        return -y if get_forward().mlp_reduce_scatter else y


@pytest.fixture
def compiled() -> Iterator[tuple[Any, Any]]:
    """A compiled module without graph breaks, and a counter of its compilations."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    yield torch.compile(Reads(), backend=counter, fullgraph=True), counter
    torch._dynamo.reset()


def published(model: Path, setting: int) -> None:
    from sglang.srt.runtime_context import SpawnRanks, publish

    args = server_args(model, torch_compile_max_bs=setting)
    publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


def test_without_the_guard_it_is_compiled_again_for_another_configuration(
    sglang: None, model: Model, compiled: tuple[Any, Any]
) -> None:
    """The baseline for the tests below."""
    from sglang.srt.runtime_context import get_forward, reset_context

    run, counter = compiled
    x = torch.ones(3)
    try:
        published(model("gpt2"), 2)
        assert run(x).tolist() == [3.0] * 3
        assert run(x).tolist() == [3.0] * 3
        assert counter.frame_count == 1
        with get_forward().scoped(mlp_reduce_scatter=True):
            assert run(x).tolist() == [-3.0] * 3
        assert counter.frame_count == 2
        published(model("gpt2"), 5)
        assert run(x).tolist() == [6.0] * 3
    finally:
        reset_context()


def test_with_the_guard_it_is_compiled_once_for_each_runner_and_flag(
    guard: None, model: Model, compiled: tuple[Any, Any]
) -> None:
    from sglang.srt.runtime_context import get_forward

    run, counter = compiled
    x = torch.ones(3)
    runners = {
        setting: sglang_distguard.build_runner(
            server_args(model("gpt2"), torch_compile_max_bs=setting), name=f"compiles {setting}"
        )
        for setting in (2, 5)
    }
    for _ in range(3):
        for setting, runner in runners.items():
            with sglang_distguard.activate(runner):
                assert run(x).tolist() == [setting + 1.0] * 3
    assert counter.frame_count == 2
    with sglang_distguard.activate(runners[5]), get_forward().scoped(mlp_reduce_scatter=True):
        assert run(x).tolist() == [-6.0] * 3
        with sglang_distguard.activate(runners[2]):  # the flag belongs to the other runner
            assert run(x).tolist() == [3.0] * 3
    assert counter.frame_count == 3
    for runner in runners.values():
        sglang_distguard.close(runner)


def test_what_was_compiled_for_one_runner_is_not_used_for_another_on_another_thread(
    guard: None, model: Model, compiled: tuple[Any, Any]
) -> None:
    run, counter = compiled
    x = torch.ones(3)
    runners = {
        setting: sglang_distguard.build_runner(
            server_args(model("gpt2"), torch_compile_max_bs=setting), name=f"compiles {setting}"
        )
        for setting in (2, 5)
    }
    together = threading.Barrier(2)
    wrong: list[Any] = []

    def work(setting: int) -> None:
        together.wait()
        with sglang_distguard.activate(runners[setting]):
            for _ in range(50):
                result = run(x).tolist()
                if result != [setting + 1.0] * 3:
                    wrong.append((setting, result))

    threads = [threading.Thread(target=work, args=(setting,)) for setting in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert counter.frame_count == 2
    for runner in runners.values():
        sglang_distguard.close(runner)


def compiling_as_another_thread_sees_it() -> tuple[bool, bool, bool]:
    """Return `is_compiling()` on the compiling thread, on another meanwhile, and afterwards."""
    inside, looked = threading.Event(), threading.Event()
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(torch.compiler.is_compiling())
        inside.set()
        assert looked.wait(60)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(lambda x: x + 1, backend=backend)
    thread = threading.Thread(target=run, args=(torch.ones(3),))
    thread.start()
    assert inside.wait(60)
    meanwhile = torch.compiler.is_compiling()
    looked.set()
    thread.join()
    torch._dynamo.reset()
    return seen[0], meanwhile, torch.compiler.is_compiling()


def test_without_the_guard_every_thread_is_told_that_it_is_compiled(sglang: None) -> None:
    """The baseline for the test below."""
    assert compiling_as_another_thread_sees_it() == (True, True, False)


def test_with_the_guard_only_the_thread_that_compiles_is_told_so(guard: None) -> None:
    assert compiling_as_another_thread_sees_it() == (True, False, False)


def test_compiled_code_is_told_that_it_is_compiled(guard: None) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_compiling() else x

    torch._dynamo.reset()
    assert torch.compile(forward, backend="eager")(torch.ones(3)).tolist() == [2.0] * 3
    assert forward(torch.ones(3)).tolist() == [1.0] * 3
    torch._dynamo.reset()
