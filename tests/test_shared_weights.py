"""Runners of one checkpoint that share weights: right, refused, detached, and their memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard as dg
from references import reference
from registry_calls import until
from runner_calls import Blocked, logits, steps_in_line, thread
from sglang_distguard.testing import bit_equal, generate, server_args
from sglang_distguard.testing.updates import weights_of

Model = Callable[..., Path]
KINDS = (("llama", "float32"), ("qwen3_moe", "bfloat16"), ("gpt2", "float32"))
Runners = tuple[Any, Any]


@pytest.fixture
def both(guard: None, model: Model) -> Iterator[Runners]:
    """Two runners of a small Llama, "one" and "two", that share weights."""
    one = dg.build_runner(server_args(model("llama")), name="one")
    two = dg.build_runner(server_args(model("llama")), name="two", share_weights_with=one)
    yield one, two
    dg.close(one)
    dg.close(two)


def parameters(runner: Any) -> dict[str, Any]:
    return dict(runner.model.named_parameters(remove_duplicate=False))


def sizes(tensors: Any) -> dict[int, int]:
    """Address -> bytes of the storages of ``tensors``."""
    storages = [it.untyped_storage() for it in tensors]
    return {it.data_ptr(): it.nbytes() for it in storages if it.nbytes()}


def in_process() -> dict[int, int]:
    """The storages of every tensor that Python code of this process has."""
    import torch

    gc.collect()
    found = [it for it in gc.get_objects() if issubclass(type(it), torch.Tensor)]
    return sizes(it for it in found if not it.is_meta and it.layout == torch.strided)


def sharing() -> list[list[str]]:
    """The holders of each sharing of weights."""
    slots = [it for it in dg.snapshot()["slots"] if it["key"].startswith("weights:")]
    return [[holder["name"] for holder in it["holders"]] for it in slots]


@pytest.mark.parametrize(("architecture", "dtype"), KINDS)
def test_runners_that_share_weights_compute_at_once_what_each_computes_alone(
    guard: None, model: Model, architecture: str, dtype: str
) -> None:
    folder = model(architecture)
    alone = reference(folder, dtype)
    one = dg.build_runner(server_args(folder, dtype=dtype), name="one")
    before, plain = in_process(), dg.memory(one)
    two = dg.build_runner(server_args(folder, dtype=dtype), name="two", share_weights_with=one)
    grown = sum(size for place, size in in_process().items() if place not in before)
    weights = sizes([*one.model.parameters(), *one.model.buffers()])
    assert (plain.weights, plain.shared) == (sum(weights.values()), 0)
    mine, given = parameters(two), parameters(one)
    assert {name: it.data_ptr() for name, it in mine.items()} == {
        name: it.data_ptr() for name, it in given.items()
    }
    assert not any(it is given[name] for name, it in mine.items())
    for runner, other in ((one, "two"), (two, "one")):
        found = dg.memory(runner)
        assert found.shared == sum(sizes(parameters(one).values()).values()) > 0
        assert found.shared_with == (other,)
        assert found.shared + found.weights == plain.weights
        assert found.kv_cache == plain.kv_cache > 0
        assert found.total == plain.total
    # Of the replica there are its pools, its buffers and some small tensors, and no weights.
    assert dg.memory(two).kv_cache <= grown < dg.memory(two).kv_cache + plain.weights
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            made = list(threads.map(lambda it: generate(it, activate=dg.activate), (one, two)))
            assert all(bit_equal(it.logits, alone.logits) for it in made)
    assert sharing() == [["one", "two"]]
    for runner in (one, two):
        dg.close(runner)
    assert sharing() == []


def from_disk(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_disk(str(folder), "auto")


def from_tensor(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_tensor(weights_of(folder))


#: Each calls a method that changes weights in place, as SGLang does.
CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "update_weights_from_disk": from_disk,
    "update_weights_from_tensor": from_tensor,
    "load_weights_from_distributed": lambda runner, folder: (
        runner.weight_updater.load_weights_from_distributed(weights_of(folder))
    ),
    "update_weights_from_ipc": lambda runner, _: runner.weight_updater.update_weights_from_ipc(
        SimpleNamespace(zmq_handles={})
    ),
    "begin_weight_update": lambda runner, _: runner.weight_updater.begin_weight_update(),
    "end_weight_update": lambda runner, _: runner.weight_updater.end_weight_update(
        run_post_load=False
    ),
    "load_model": lambda runner, _: runner.load_model(),
    "check_weights": lambda runner, _: runner.check_weights("reset_tensors", role="target"),
}


def test_every_change_of_shared_weights_is_refused_until_one_is_detached(
    both: Runners, model: Model
) -> None:
    other = model("llama", seed=1)
    old = logits(both[0])
    for runner, sharer in (both, both[::-1]):
        for name, change in CHANGES.items():
            with pytest.raises(dg.StateInUse, match=rf"{name}\(\) would change .* detach_weights"):
                change(runner, other)
        with pytest.raises(dg.StateInUse) as told:
            from_disk(runner, other)
        assert told.value.details["holders"] == [name_of(sharer)]
        assert runner.check_weights("checksum", role="target")  # it only reads
        assert bit_equal(logits(runner), old)
    one, two = both
    assert dg.detach_weights(two) is True
    assert dg.detach_weights(two) is dg.detach_weights(one) is False
    assert [dg.memory(it).shared for it in both] == [0, 0]
    assert not sizes(parameters(one).values()).keys() & sizes(parameters(two).values()).keys()
    assert bit_equal(logits(two), old)
    assert from_tensor(two, other)[0]
    fresh = dg.build_runner(server_args(other), name="fresh")
    assert bit_equal(logits(two), logits(fresh))
    assert bit_equal(logits(one), old)
    # The other one is the last that shares, so that its weights are its own, too.
    assert from_disk(one, other)[0]
    assert bit_equal(logits(one), logits(fresh))
    dg.close(fresh)


def name_of(runner: Any) -> str:
    return vars(runner)["_sglang_distguard_handle"].name


def test_without_the_refusal_an_update_of_one_changes_the_numbers_of_the_other(
    both: Runners, model: Model
) -> None:
    one, two = both
    old = logits(one)
    two.model.load_weights(weights_of(model("llama", seed=1)))  # past every hook
    assert not bit_equal(logits(one), old)
    assert bit_equal(logits(one), logits(two))


def test_the_source_may_close_first_and_the_survivor_owns_the_weights(
    guard: None, model: Model
) -> None:
    one = dg.build_runner(server_args(model("llama")), name="one")
    two = dg.build_runner(server_args(model("llama")), name="two", share_weights_with=one)
    # A replica may be a source: all three share.
    three = dg.build_runner(server_args(model("llama")), name="three", share_weights_with=two)
    assert sharing() == [["one", "two", "three"]]
    assert dg.memory(three).shared_with == ("one", "two")
    old = logits(one)
    places = sizes(parameters(one).values())
    gone = weakref.ref(one.model)
    dg.close(one)
    del one
    gc.collect()
    assert gone() is None
    assert places == sizes(parameters(three).values())
    assert bit_equal(logits(two), old)
    with pytest.raises(dg.StateInUse, match="shares with 'three'"):
        from_disk(two, model("llama", seed=1))
    dg.close(three)
    assert dg.memory(two).shared == 0
    assert from_disk(two, model("llama", seed=1))[0]
    assert not bit_equal(logits(two), old)
    dg.close(two)
    assert sharing() == []


def test_what_differs_is_refused_by_name_and_leaves_the_source_as_it_was(
    runner: Any, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, places = logits(runner), sizes(parameters(runner).values())
    shared = {"name": "replica", "share_weights_with": runner}
    other = r"'served' cannot be shared: .*lm_head.weight .*other content"
    with pytest.raises(dg.SpecMismatch, match=other) as told:
        dg.build_runner(server_args(model("llama", seed=1)), **shared)
    assert told.value.details["holders"] == ["served"]
    with pytest.raises(
        dg.SpecMismatch, match=r"dtype \(existing: torch.float32, requested: torch.b"
    ):
        dg.build_runner(server_args(model("llama"), dtype="bfloat16"), **shared)
    with pytest.raises(
        dg.SpecMismatch, match=r"architectures \(existing: .*requested: \['GPT2LMHeadModel'"
    ):
        dg.build_runner(server_args(model("gpt2")), **shared)
    adapted = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}
    with pytest.raises(dg.NotSupported, match="enable_lora=True, with which SGLang moves"):
        dg.build_runner(server_args(model("llama"), **adapted), **shared)
    with pytest.raises(dg.NotSupported, match="a draft runner does not share weights"):
        dg.build_runner(server_args(model("llama")), target=runner, **shared)
    with pytest.raises(TypeError, match="share_weights_with must be a ModelRunner"):
        dg.build_runner(server_args(model("llama")), share_weights_with=object())  # type: ignore[arg-type]

    def fails(*_args: Any, **_kwargs: Any) -> None:
        raise MemoryError("planted")

    from sglang.srt.model_executor.model_runner import ModelRunner

    with monkeypatch.context() as patched:  # after it has taken the source's storages
        patched.setattr(ModelRunner, "configure_kv_cache_dtype", fails)
        with pytest.raises(MemoryError, match="planted"):
            dg.build_runner(server_args(model("llama")), **shared)
    assert sharing() == [["served"]]
    assert dg.memory(runner).shared == 0
    assert sizes(parameters(runner).values()) == places
    assert bit_equal(logits(runner), old)
    assert from_disk(runner, model("llama", seed=1))[0]


def test_sharing_waits_for_an_update_of_the_source_and_finds_other_weights(
    runner: Any, model: Model
) -> None:
    blocked = Blocked(runner.model.load_weights)
    runner.model.load_weights = blocked
    updater, updated = thread(lambda: from_tensor(runner, model("llama", seed=1)))
    blocked.inside.wait()
    builder, built = thread(
        lambda: dg.build_runner(server_args(model("llama")), name="two", share_weights_with=runner)
    )
    waiting = lambda: dg.snapshot()["phases"]  # noqa: E731
    until(lambda: any(not it["inside"] for it in waiting()) or not builder.is_alive())
    assert builder.is_alive()
    assert steps_in_line()
    blocked.go_on.set()
    updater.join()
    builder.join()
    del runner.model.load_weights
    assert updated[0][0], updated
    assert isinstance(built[0], dg.SpecMismatch), built
