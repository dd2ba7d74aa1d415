"""What ends while something runs: weights that change, runners that are closed, a guard that is taken out."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from registry_calls import until
from sglang_distguard.testing import bit_equal, server_args, steps

Model = Callable[..., Path]


@pytest.fixture
def runner(guard: None, model: Model) -> Iterator[Any]:
    made = dg.build_runner(server_args(model("llama")), name="served")
    yield made
    dg.close(made)


class Blocked:
    """A function that stops in the middle of what it stands for, once, until it may go on."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.finished = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.inside.is_set():
            self.inside.set()
            self.go_on.wait()
        result = self._function(*args, **kwargs)
        self.finished = True
        return result


def thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    made = threading.Thread(target=run, name="worker")
    made.start()
    return made, out


def queued() -> list[Any]:
    return [it["step"] for it in dg.snapshot()["rooms"] if not it["inside"]]


def logits(runner: Any) -> Any:
    return steps.generate(runner, steps=0).logits


def weights(folder: Path) -> list[tuple[str, Any]]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").items())


def from_tensor(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_tensor(weights(folder))


def from_disk(runner: Any, folder: Path) -> Any:
    return runner.weight_updater.update_weights_from_disk(str(folder), "auto")


UPDATES = {"tensor": from_tensor, "disk": from_disk}


@pytest.mark.parametrize("kind", UPDATES)
def test_a_forward_waits_for_new_weights_of_its_runner_and_no_other_runners_does(
    runner: Any, model: Model, kind: str
) -> None:
    other = dg.build_runner(server_args(model("gpt2")), name="other")
    new = model("llama", seed=1)
    blocked = Blocked(runner.model.load_weights)

    def half(given: Any) -> Any:
        # The first tensors are the new ones already when the forward comes.
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
    until(lambda: "forward" in queued())
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
    until(lambda: "update_weights_from_tensor" in queued())
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


def test_close_waits_for_a_forward_and_says_who_is_in_what(runner: Any) -> None:
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, read = thread(lambda: logits(runner))
    blocked.inside.wait()
    with pytest.raises(dg.StateInUse, match=r"still in forward\(\) in thread worker") as caught:
        dg.close(runner, timeout=0.05)
    assert caught.value.details["steps"] == ["forward"]
    closer, closed = thread(lambda: dg.close(runner))
    until(lambda: len([it for it in dg.snapshot()["rooms"] if not it["inside"]]) == 1)
    blocked.go_on.set()
    reader.join()
    closer.join()
    assert closed == [True]
    assert blocked.finished  # what came after it, `sample`, may have been too late
    assert read
    with pytest.raises(dg.DistGuardError, match="is closed"):
        logits(runner)


def test_close_by_force_waits_for_nobody(runner: Any) -> None:
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, read = thread(lambda: logits(runner))
    blocked.inside.wait()
    assert dg.close(runner, force=True)
    blocked.go_on.set()
    reader.join()
    assert read


def test_a_runner_is_not_closed_from_within_its_own_step(runner: Any) -> None:
    def close_inside(*_args: Any, **_kwargs: Any) -> Any:
        dg.close(runner)

    runner.model.forward = close_inside
    with pytest.raises(dg.StateInUse, match=r"from within its own forward\(\)"):
        logits(runner)
    del runner.model.forward
    assert logits(runner).shape[-1] > 0


def test_uninstall_is_refused_while_code_of_ours_is_inside(runner: Any) -> None:
    with dg.activate(runner), pytest.raises(dg.StateInUse, match=r"activate\('served'\)"):
        dg.uninstall()
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, _ = thread(lambda: logits(runner))
    blocked.inside.wait()
    with pytest.raises(dg.StateInUse, match="forward of runner 'served'"):
        dg.uninstall()
    blocked.go_on.set()
    reader.join()
    del runner.model.forward
    assert dg.is_installed()


def test_what_is_suspended_goes_on_after_uninstall(sglang: None) -> None:
    from sglang.srt.model_executor.runner_utils import capture_mode

    dg.install()
    block = capture_mode.model_capture_mode()
    block.__enter__()
    assert capture_mode.get_is_capture_mode()
    dg.uninstall()
    block.__exit__(None, None, None)
    assert not capture_mode.get_is_capture_mode()


def test_a_failed_build_keeps_no_weights_alive_through_its_error(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    kept: list[weakref.ref[Any]] = []

    class OutOfMemory(RuntimeError):
        pass

    def fail(self: Any, *_args: Any, **_kwargs: Any) -> None:
        kept.append(weakref.ref(self.model))
        raise OutOfMemory("no memory for the pool")

    monkeypatch.setattr(ModelRunner, "alloc_memory_pool", fail)
    (result,) = dg.build_runners([server_args(model("llama"))], progress=False)
    assert isinstance(result.error, OutOfMemory)
    gc.collect()
    assert kept[0]() is None
    monkeypatch.undo()

    def fail_late(self: Any, *_args: Any, **_kwargs: Any) -> None:
        kept.append(weakref.ref(self.model))
        raise OutOfMemory("no memory for the weights")

    monkeypatch.setattr(ModelRunner, "configure_kv_cache_dtype", fail_late)
    with pytest.raises(OutOfMemory) as caught:
        steps.build(server_args(model("llama")))
    gc.collect()
    assert kept[1]() is None
    assert caught.value.args == ("no memory for the weights",)
