"""A capture of graphs excludes all other work; all logits are right during it and afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard
from conftest import CLOSE
from interpreters import Has, run_well
from references import reference
from registry_calls import run_in_threads
from sglang_distguard.testing import bit_equal, generate, max_abs_error, server_args
from sglang_distguard.testing.graphs import CPU_GRAPHS, allow_cpu_graphs

Model = Callable[[str], Path]
#: Number of times that all runners compute at once.
ROUNDS = 10


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.model_executor import cpu_graph_runner

    backends = attention_registry.ATTENTION_BACKENDS
    monkeypatch.setitem(backends, "torch_native", backends["torch_native"])  # put back afterwards
    monkeypatch.setattr(cpu_graph_runner, "register_fake_ops", None)
    allow_cpu_graphs()


def all_at_once(runners: list[Any], rounds: int) -> list[list[Any]]:
    """Per runner, the logits of ``rounds`` generations; all threads begin each one together."""
    together = threading.Barrier(len(runners))
    made: list[list[Any]] = [[] for _ in runners]

    def work(runner: Any, logits: list[Any]) -> None:
        try:
            for _ in range(rounds):
                together.wait(120)
                logits.append(generate(runner, activate=sglang_distguard.activate).logits)
        except BaseException:
            together.abort()
            raise

    run_in_threads(
        *(
            lambda runner=runner, logits=logits: work(runner, logits)
            for runner, logits in zip(runners, made, strict=True)
        )
    )
    return made


def test_graphs_captured_beside_forwards_are_right_then_and_when_all_compute_at_once(
    guard: None, graphs: None, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from sglang.srt.model_executor.cpu_graph_runner import CPUGraphRunner

    captured, bystander = model("llama"), model("gpt2")
    call = f"main({str(captured)!r}, {str(tmp_path / 'alone')!r})\n"
    run_well("from graph_programs import main\n", call, has=Has.SGLANG)
    alone = torch.load(tmp_path / "alone")
    eager = reference(captured).logits
    expected = reference(bystander).logits

    capturing: set[int] = set()
    met: list[str] = []
    both = threading.Barrier(2)
    capture = CPUGraphRunner.capture

    def noted(self: Any) -> None:
        if capturing:
            met.append("another capture")
        capturing.add(id(self))
        try:
            capture(self)
        finally:
            capturing.remove(id(self))

    monkeypatch.setattr(CPUGraphRunner, "capture", noted)
    third = sglang_distguard.build_runner(server_args(bystander), name="bystander")
    forward = third.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if capturing:
            met.append("a forward")
        return forward(*args, **kwargs)

    third.model.forward = watched
    built: dict[str, Any] = {}
    errors: list[BaseException] = []

    def build(name: str) -> None:
        try:
            both.wait()
            built[name] = sglang_distguard.build_runner(
                server_args(captured, **CPU_GRAPHS), name=name
            )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    rounds = 0
    while any(thread.is_alive() for thread in threads):
        made = generate(third, activate=sglang_distguard.activate)
        assert bit_equal(made.logits, expected)
        rounds += 1
    assert errors == []
    assert (met, rounds > 0) == ([], True)
    assert max_abs_error(alone, eager) < CLOSE
    replays = {id(runner.decode_cuda_graph_runner): 0 for runner in built.values()}
    execute = CPUGraphRunner.execute

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        replays[id(self)] += 1
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(CPUGraphRunner, "execute", counted)
    made = all_at_once([*built.values(), third], ROUNDS)
    for logits, bits in zip(made, (alone, alone, expected), strict=True):
        assert [bit_equal(it, bits) for it in logits] == [True] * ROUNDS
    assert all(count >= ROUNDS for count in replays.values())
    for runner in (third, *built.values()):
        sglang_distguard.close(runner)


def test_weight_updates_that_capture_graphs_anew_begin_in_the_capture_phase(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang 0.5.23 captures anew on GPUs only; the test simulates a platform that can."""
    from sglang.srt.model_executor.model_runner_components import weight_updater
    from sglang_distguard.hooks import model_runner

    able = SimpleNamespace(graph_capture=True)
    platform = SimpleNamespace(is_out_of_tree=lambda: True, capabilities=able)
    monkeypatch.setattr(weight_updater, "current_platform", platform)
    monkeypatch.setattr(model_runner, "_captures", lambda: True)
    path = model("gpt2")
    expected = reference(path).logits
    runners: dict[str, Any] = {
        name: sglang_distguard.build_runner(server_args(path), name=name) for name in ("one", "two")
    }
    inside: list[Any] = []
    outcomes: dict[str, Any] = {}
    both = threading.Barrier(2)

    def update(name: str) -> None:
        runner = runners[name]
        load = runner.model.load_weights

        def watched(weights: Any) -> Any:
            inside.append(
                [it["phase"] for it in sglang_distguard.snapshot()["phases"] if it["inside"]]
            )
            return load(weights)

        runner.model.load_weights = watched
        both.wait()
        try:
            outcomes[name] = runner.weight_updater.update_weights_from_disk(
                str(path), "auto", recapture_cuda_graph=True
            )
        except BaseException as error:
            outcomes[name] = error

    threads = [threading.Thread(target=update, args=(name,)) for name in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == dict.fromkeys(runners, (True, "Succeeded to update model weights."))
    assert inside == [["phase:capture"], ["phase:capture"]]
    for runner in runners.values():
        assert bit_equal(generate(runner, activate=sglang_distguard.activate).logits, expected)
        sglang_distguard.close(runner)
