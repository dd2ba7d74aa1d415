"""Changes of a runner and its own forwards exclude each other; other runners stay free."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard as dg
from interpreters import Forked
from registry_calls import until
from runner_calls import Blocked, logits, steps_in_line, steps_inside, thread
from sglang_distguard.hooks.memory_saver import make_implementation
from sglang_distguard.testing import bit_equal, free_port, server_args
from sglang_distguard.testing.updates import memory_of, weights_of

Model = Callable[..., Path]


def from_tensor(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_tensor(weights_of(folder))


def from_disk(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_disk(str(folder), "auto")


def from_distributed(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.load_weights_from_distributed(weights_of(folder))


UPDATES = {"tensor": from_tensor, "disk": from_disk, "distributed": from_distributed}


@pytest.mark.parametrize("kind", UPDATES)
def test_a_forward_waits_for_new_weights_of_its_runner_and_no_other_runners_does(
    runner: Any, model: Model, kind: str
) -> None:
    other = dg.build_runner(server_args(model("gpt2")), name="other")
    new = model("llama", seed=1)
    blocked = Blocked(runner.model.load_weights)

    def half(given: Any) -> Any:
        # The first tensors are already new when the forward comes.
        given = list(given)
        first = runner.model.__class__.load_weights(runner.model, given[: len(given) // 2])
        blocked()
        runner.model.__class__.load_weights(runner.model, given[len(given) // 2 :])
        return first

    blocked._function = lambda: None
    runner.model.load_weights = half
    updater, updated = thread(lambda: UPDATES[kind](runner, new))
    blocked.inside.wait()
    reader, read = thread(lambda: logits(runner))
    until(lambda: "forward" in steps_in_line())
    assert logits(other).shape[-1] > 0  # other runners stay free
    blocked.go_on.set()
    updater.join()
    reader.join()
    assert updated[0][0] is True, updated
    del runner.model.load_weights
    assert bit_equal(read[0], logits(runner))
    fresh = dg.build_runner(server_args(new), name="fresh")
    assert bit_equal(read[0], logits(fresh))
    for it in (other, fresh):
        dg.close(it)


def test_new_weights_wait_for_a_forward_of_the_runner(runner: Any, model: Model) -> None:
    old = logits(runner)
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, read = thread(lambda: logits(runner))
    blocked.inside.wait()
    updater, updated = thread(lambda: from_tensor(runner, model("llama", seed=1)))
    until(lambda: "update_weights_from_tensor" in steps_in_line())
    blocked.go_on.set()
    reader.join()
    updater.join()
    del runner.model.forward
    assert bit_equal(read[0], old)
    assert updated[0][0] is True
    assert not bit_equal(logits(runner), old)


def test_forwards_under_updates_are_all_old_or_all_new(runner: Any, model: Model) -> None:
    folders = [model("llama", seed=seed) for seed in (0, 1)]
    wanted = []
    for folder in folders:
        from_tensor(runner, folder)
        wanted.append(logits(runner))
    stop = threading.Event()

    def train() -> int:
        count = 0
        while not stop.is_set():
            assert from_tensor(runner, folders[count % 2])[0]
            count += 1
        return count

    trainer, trained = thread(train)
    read = [logits(runner) for _ in range(60)]
    stop.set()
    trainer.join()
    assert isinstance(trained[0], int), trained
    assert all(any(bit_equal(it, want) for want in wanted) for it in read)


EVERYTHING = SimpleNamespace(tags=None)
#: Each calls a method of SGLang's as SGLang does. Methods that a CPU or this configuration does not
#: support (LoRA, IPC) fail, but only after they have waited.
CHANGES: dict[str, Callable[[Any, Path], object]] = {
    "update_weights_from_tensor": from_tensor,
    "update_weights_from_disk": from_disk,
    "load_weights_from_distributed": from_distributed,
    "update_weights_from_ipc": lambda runner, _: runner.weight_updater.update_weights_from_ipc(
        SimpleNamespace(zmq_handles={})
    ),
    "begin_weight_update": lambda runner, _: runner.weight_updater.begin_weight_update(),
    "end_weight_update": lambda runner, _: runner.weight_updater.end_weight_update(
        run_post_load=False
    ),
    "load_lora_adapter": lambda runner, _: runner.load_lora_adapter(None),
    "load_lora_adapter_from_tensors": lambda runner, _: runner.load_lora_adapter_from_tensors(
        None, {}, {}
    ),
    "unload_lora_adapter": lambda runner, _: runner.unload_lora_adapter(None),
    "load_model": lambda runner, _: runner.load_model(),
    "release_memory_occupation": lambda runner, _: memory_of(
        runner, saves=False
    ).release_memory_occupation(EVERYTHING),
    "resume_memory_occupation": lambda runner, _: memory_of(
        runner, "kv_cache", saves=False
    ).resume_memory_occupation(SimpleNamespace(tags=["kv_cache"])),
}


#: Those of them that raise because they are not supported here. IPC reports it in its result.
FAIL = {
    "load_lora_adapter",
    "load_lora_adapter_from_tensors",
    "unload_lora_adapter",
    "release_memory_occupation",
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_waits_for_a_forward_of_the_runner(
    runner: Any, model: Model, change: str
) -> None:
    old = logits(runner)
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, read = thread(lambda: logits(runner))
    blocked.inside.wait()
    changer, changed = thread(lambda: CHANGES[change](runner, model("llama", seed=1)))
    until(lambda: change in steps_in_line())
    blocked.go_on.set()
    reader.join()
    changer.join()
    assert bit_equal(read[0], old)
    assert isinstance(changed[0], Exception) == (change in FAIL), changed


def test_a_runners_memory_has_tags_of_its_own(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.utils import torch_memory_saver_adapter

    asked: list[tuple[str, str]] = []
    saver = SimpleNamespace(
        pause=lambda tag: asked.append(("pause", tag)),
        resume=lambda tag: asked.append(("resume", tag)),
        region=lambda tag, **_: asked.append(("region", tag)) or nullcontext(),
        cuda_graph=lambda **given: asked.append(("cuda_graph", given["tag"])) or nullcontext(),
    )
    monkeypatch.setattr(torch_memory_saver_adapter, "_memory_saver", saver, raising=False)
    adapter = torch_memory_saver_adapter._TorchMemorySaverAdapterReal()
    tags = []
    runners = [dg.build_runner(server_args(model(name))) for name in ("llama", "gpt2")]
    for runner in runners:
        asked.clear()
        with dg.activate(runner):
            adapter.pause("weights")
            adapter.resume("weights")
            with adapter.region("weights"), adapter.cuda_graph(tag="weights"):
                pass
        (tag,) = {tag for _, tag in asked}
        assert [name for name, _ in asked] == ["pause", "resume", "region", "cuda_graph"]
        tags.append(tag)
    assert tags[0] == "weights"  # SGLang's default scope: as without the guard
    assert tags[1].startswith("weights of scope ")
    for runner in runners:
        dg.close(runner)


def test_two_threads_that_use_torch_memory_saver_first_use_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its own way fails in one of them, if both are making it at once."""
    from torch_memory_saver import entrypoint

    meet = threading.Barrier(2)
    monkeypatch.setattr(entrypoint, "_TorchMemorySaverImpl", lambda **_: (meet.wait(), object())[1])

    def used(make: Callable[[Any], None]) -> list[Any]:
        saver = entrypoint.TorchMemorySaver()

        def use(_: int) -> Any:
            try:
                make(saver)
                return saver._impl
            except AttributeError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(use, range(2)))

    first, second = used(make_implementation)
    assert first is second
    assert type(first) is object
    plain = used(entrypoint.TorchMemorySaver._ensure_initialized)
    assert [type(it) for it in plain].count(AttributeError) == 1


SENDER = """
    import sys
    import torch
    from safetensors.torch import load_file
    from sglang.srt.utils.common import init_custom_process_group

    port, folder, last = sys.argv[1:]
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name="new"
    )
    for name, tensor in load_file(folder + "/model.safetensors").items():
        if name == last:
            sys.stdin.readline()  # until the other side has been seen to wait
        torch.distributed.broadcast(tensor, src=0, group=group)
"""


def test_weights_of_another_process_are_received_beside_forwards_and_loaded_alone(
    runner: Any, model: Model
) -> None:
    new, port = model("llama", seed=1), free_port()
    given = weights_of(new)
    old = logits(runner)
    reading, writing = os.pipe()
    sender = Forked(SENDER, arguments=[str(port), str(new), given[-1][0]], stdin=reading)
    os.close(reading)
    updater = runner.weight_updater
    made = updater.init_weights_update_group("127.0.0.1", port, 1, 2, "new", backend="gloo")
    assert made[0], made
    names = [name for name, _ in given]
    shapes = [tensor.shape for _, tensor in given]
    dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in given]
    receiver, received = thread(
        lambda: updater.receive_weights_from_distributed(
            names=names, dtypes=dtypes, shapes=shapes, group_name="new"
        )
    )
    until(lambda: "receive_weights_from_distributed" in steps_inside() or not receiver.is_alive())
    assert bit_equal(logits(runner), old)  # the last tensor has not been sent
    assert receiver.is_alive()
    os.write(writing, b"\n")
    os.close(writing)
    receiver.join()
    ended = sender.wait()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert isinstance(received[0], list), received
    assert updater.load_weights_from_distributed(received[0])[0]
    assert updater.destroy_weights_update_group("new")[0]
    fresh = dg.build_runner(server_args(new), name="fresh")
    assert bit_equal(logits(runner), logits(fresh))
    dg.close(fresh)
