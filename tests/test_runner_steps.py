"""What each public method of a runner is to other runners: one table, as long as SGLang's class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang_distguard
from registry_calls import inside
from sglang_distguard.targets import model_runner
from sglang_distguard.testing import server_args


def public_methods(of: type) -> set[str]:
    members = {name: value for kind in of.__mro__[:-1] for name, value in vars(kind).items()}
    return {
        name
        for name, value in members.items()
        if not name.startswith("_") and (callable(value) or hasattr(value, "__get__"))
    }


def test_every_public_method_of_a_runner_is_in_a_room_or_in_none_for_a_reason(sglang: None) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    named = [name for steps in model_runner.TABLE for name in steps.names.split()]
    assert sorted(named) == sorted(public_methods(ModelRunner))
    for steps in model_runner.TABLE:
        assert (steps.room is None) == bool(steps.why_in_no_room), steps


def test_adapters_are_loaded_and_weights_checked_in_the_room_for_loads(
    guard: None, model: Callable[[str], Path]
) -> None:
    runner: Any = sglang_distguard.build_runner(server_args(model("gpt2")))
    seen: list[list[str]] = []

    def note(*_args: Any, **_options: Any) -> None:
        seen.append(inside())

    runner.lora_manager = SimpleNamespace(
        load_lora_adapter=note, load_lora_adapter_from_tensors=note, unload_lora_adapter=note
    )
    runner._weight_checker = SimpleNamespace(handle=note)
    runner.load_lora_adapter("adapter")
    runner.load_lora_adapter_from_tensors("adapter", {}, {})
    runner.unload_lora_adapter("adapter")
    runner.check_weights("snapshot", role="target")
    assert seen == [["room:load"]] * 4
    sglang_distguard.close(runner)
