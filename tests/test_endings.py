"""Endings while code runs: runners are closed, the guard is uninstalled, builds fail."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from registry_calls import until
from runner_calls import Blocked, logits, steps_in_line, thread
from sglang_distguard.testing import server_args, steps

Model = Callable[..., Path]


def test_close_waits_for_a_forward_and_names_the_step_and_its_thread(runner: Any) -> None:
    blocked = Blocked(runner.model.forward)
    runner.model.forward = blocked
    reader, read = thread(lambda: logits(runner))
    blocked.inside.wait()
    with pytest.raises(dg.StateInUse, match=r"still in forward\(\) in thread worker") as caught:
        dg.close(runner, timeout=0.05)
    assert caught.value.details["steps"] == ["forward"]
    closer, closed = thread(lambda: dg.close(runner))
    until(lambda: len(steps_in_line()) == 1)
    blocked.go_on.set()
    reader.join()
    closer.join()
    assert closed == [True]
    assert blocked.finished  # the `sample` after it may have come too late
    assert read
    with pytest.raises(dg.DistGuardError, match="is closed"):
        logits(runner)


def test_close_by_force_does_not_wait(runner: Any) -> None:
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
