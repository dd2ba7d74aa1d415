"""Each runner has the pool that it has alone, whatever its neighbours take, or is refused at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from sglang_distguard import BuildRequest, NotEnoughMemory, RunnerClosed, _core
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.testing import server_args

Model = Callable[..., Path]
MB = 1_000_000
GIB = 1 << 30


def unlimited(folder: Path, fraction: float, **overrides: Any) -> Any:
    """SGLang's settings for a pool that takes all of ``fraction``."""
    return server_args(folder, mem_fraction_static=fraction, max_total_tokens=None, **overrides)


def cell(runner: Any) -> int:
    """Bytes of one token in the runner's pool of keys and values."""
    pool = runner.token_to_kv_pool
    buffers = [*pool.k_buffer, *pool.v_buffer]
    return sum(it.element_size() * it[0].numel() for it in buffers)


def promised() -> dict[str, int]:
    return dict(_core.promised_memory("cpu"))


def test_the_pool_is_the_one_of_a_runner_alone_in_any_order_and_at_once(
    guard: None, model: Model
) -> None:
    """Without the hook each counts what the others take as its own.

    Other processes change what a CPU has free at any time. So the first runner here is one whose
    size is given; the room that it finds is the one of all.
    """
    folder = model("llama")
    first = dg.build_runner(server_args(folder), name="first")
    room = int(first.pre_model_load_memory * GIB)
    requests = [
        BuildRequest(unlimited(folder, fraction), name=name)
        for name, fraction in (("a", 0.01), ("b", 0.02), ("c", 0.01))
    ]
    at_once = [result.unwrap() for result in dg.build_runners(requests, progress=False)]
    in_a_row = dg.build_runner(unlimited(folder, 0.02), name="d")
    for runner, fraction in zip([*at_once, in_a_row], (0.01, 0.02, 0.01, 0.02), strict=True):
        # SGLang's formula, with the numbers of a runner alone.
        expected = (int(room * fraction) - dg.memory(runner).weights) // cell(runner)
        assert abs(runner.max_total_num_tokens - expected) <= 1
        assert round(runner.pre_model_load_memory * GIB) == room
        # SGLang reports the weights of this runner alone; it makes a table of positions later.
        assert 0 < runner.weight_load_mem_usage * GIB <= dg.memory(runner).weights
    assert at_once[0].max_total_num_tokens == at_once[2].max_total_num_tokens
    assert at_once[1].max_total_num_tokens == in_a_row.max_total_num_tokens
    assert set(promised()) == {"first", "a", "b", "c", "d"}
    assert promised()["first"] == dg.memory(first).total
    for runner in (first, *at_once, in_a_row):
        dg.close(runner)
    assert promised() == {}


def test_memory_is_a_budget_of_bytes_or_a_fraction_and_is_kept(guard: None, model: Model) -> None:
    import psutil

    folder = model("llama")
    total = psutil.virtual_memory().total
    budgets = (40 * MB, 40 * MB, 100 * MB / total)
    requests = [
        BuildRequest(unlimited(folder, fraction), name=str(index), memory=budget)
        for index, (budget, fraction) in enumerate(zip(budgets, (0.5, 0.9, 0.3), strict=True))
    ]
    runners = [result.unwrap() for result in dg.build_runners(requests, progress=False)]
    with dg.runner_scope("3", memory=40 * MB):
        runners.append(dg.build_runner(unlimited(folder, 0.9)))
    tokens = [runner.max_total_num_tokens for runner in runners]
    for runner, budget in zip(runners, (40 * MB, 40 * MB, 100 * MB, 40 * MB), strict=True):
        taken = dg.memory(runner).weights + runner.max_total_num_tokens * cell(runner)
        assert budget - 2 * cell(runner) <= taken <= budget
    assert tokens[0] == tokens[1] == tokens[3] < tokens[2]
    for runner in runners:
        dg.close(runner)


def test_what_exceeds_the_rest_is_refused_before_anything_is_loaded(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    folder = model("llama")
    small = dg.build_runner(unlimited(folder, 0.02), name="small", memory=20 * MB)
    room, held = int(_core.measured_room("cpu", 0)), promised()["small"]
    assert 20 * MB <= held < 20.1 * MB  # with SGLang's table of requests
    loads: list[str] = []
    monkeypatch.setattr(ModelRunner, "load_model", lambda self: loads.append("load"))
    with pytest.raises(NotEnoughMemory, match=r"'large' asks for .* 'small' 20\.0. MB") as caught:
        dg.build_runner(unlimited(folder, 1.0), name="large")
    assert caught.value.details == {
        "runner": "large",
        "device": "cpu",
        "asked": room,
        "left": room - held,
        "room": room,
        "promised": [{"runner": "small", "bytes": held}],
    }
    assert f"memory={room - held}" in str(caught.value)
    assert "close one of those" in str(caught.value)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(NotEnoughMemory, match=r"memory=1\.0"):
        dg.build_runner(server_args(folder), name="whole", memory=1.0)
    assert loads == []
    monkeypatch.undo()
    # What was refused is not promised, and neither is what failed.
    with pytest.raises(NotEnoughMemory, match=r"its weights take .*Ask for more than") as caught:
        dg.build_runner(unlimited(folder, 0.5), name="tiny", memory=1000)
    least = caught.value.details["least"]
    assert list(promised()) == ["small"]
    with pytest.raises(ValueError, match="leave no GPU memory"):
        dg.build_runner(unlimited(folder, 1e-9), name="none")
    assert list(promised()) == ["small"]
    fits = dg.build_runner(unlimited(folder, 0.5), name="fits", memory=least + 4 * MB)
    dg.close(small)
    assert list(promised()) == ["fits"]
    assert promised()["fits"] >= least + 4 * MB
    dg.close(fits)


def test_a_runner_alone_that_asks_for_more_than_there_is_hears_of_no_other(
    guard: None, model: Model
) -> None:
    with pytest.raises(NotEnoughMemory, match="no other runner was promised any") as caught:
        dg.build_runner(server_args(model("llama")), name="alone", memory=10**18)
    assert caught.value.details["promised"] == []
    left = caught.value.details["left"]
    assert f"Ask for at most {left} bytes" in str(caught.value)
    assert "close" not in str(caught.value)


def test_a_pool_that_is_limited_in_tokens_is_at_most_what_others_leave(
    guard: None, model: Model
) -> None:
    folder = model("llama")
    other = dg.build_runner(server_args(folder), name="other")
    # As if it took nearly all.
    _core.count_memory(handle_of(other), _core.measured_room("cpu", 0) - 30 * MB)
    runner = dg.build_runner(
        server_args(folder, mem_fraction_static=0.5, max_total_tokens=10**9), name="many"
    )
    taken = dg.memory(runner).weights + runner.max_total_num_tokens * cell(runner)
    assert 30 * MB - 2 * cell(runner) <= taken <= 30 * MB
    for it in (other, runner):
        dg.close(it)


def test_a_promise_ends_when_the_memory_is_free(guard: None, model: Model) -> None:
    runner = dg.build_runner(server_args(model("gpt2")), name="forced")
    dg.close(runner, force=True)  # a method may still run with its tensors
    assert list(promised()) == ["forced"]
    del runner
    gc.collect()
    assert promised() == {}


def test_a_draft_is_paid_by_its_own_promise_where_its_target_has_a_pool(
    guard: None, model: Model
) -> None:
    folder = model("llama")
    target = dg.build_runner(unlimited(folder, 0.5), name="target", memory=20 * MB)
    draft = dg.build_runner(unlimited(folder, 0.5), name="draft", target=target, memory=10 * MB)
    assert promised()["target"] >= 20 * MB
    assert promised()["draft"] >= 10 * MB
    dg.close(target)
    assert list(promised()) == ["draft"]
    dg.close(draft)


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.5, True, "1GB", float("nan")])
def test_memory_that_is_no_amount_is_refused(guard: None, model: Model, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="memory must be"):
        dg.build_runner(server_args(model("gpt2")), memory=wrong)


def test_a_closed_runner_keeps_no_tensor_though_its_caller_keeps_it(
    guard: None, model: Model
) -> None:
    import weakref

    runner = dg.build_runner(server_args(model("gpt2")), name="kept")
    pool: Any = runner.token_to_kv_pool
    tensors = [weakref.ref(next(runner.model.parameters())), weakref.ref(pool.k_buffer[0])]
    del pool
    dg.close(runner)
    gc.collect()
    assert [it() for it in tensors] == [None, None]
    with pytest.raises(RunnerClosed, match="'kept' is closed and has no 'req_to_token_pool'"):
        _ = runner.req_to_token_pool
    assert not hasattr(runner, "model")
    with pytest.raises(dg.DistGuardError, match="'kept' is closed"):
        runner.forward(None)  # type: ignore[arg-type]
