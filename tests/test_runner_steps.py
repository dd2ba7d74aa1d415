"""One table has the phase of each public method of SGLang's runner class."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_distguard
from registry_calls import inside
from sglang_distguard.hooks import given_runners, model_runner
from sglang_distguard.patching import find_source
from sglang_distguard.testing import server_args


def public_methods(of: type) -> set[str]:
    members = {name: value for kind in of.__mro__[:-1] for name, value in vars(kind).items()}
    return {
        name
        for name, value in members.items()
        if not name.startswith("_") and (callable(value) or hasattr(value, "__get__"))
    }


def test_every_public_method_of_a_runner_is_in_a_phase_or_in_none_for_a_reason(
    sglang: None,
) -> None:
    from sglang.srt.model_executor.model_runner import ModelRunner

    named = [name for steps in model_runner.TABLE for name in steps.names.split()]
    assert sorted(named) == sorted(public_methods(ModelRunner))
    for steps in model_runner.TABLE:
        assert (steps.phase is None) == bool(steps.why_in_no_phase), steps


def test_adapters_are_loaded_and_weights_checked_in_the_load_phase(
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
    assert seen == [["phase:load"]] * 4
    sglang_distguard.close(runner)


#: Reads of scoped values: the accessors of sglang.srt.runtime_context, and environment variables.
READS = re.compile(
    r"\bget_(context|parallel|server_args|flags|resources|forward|device|model|exec|schedule|memory|spec"
    r"|lora|mm|disagg|serving|observability)\(\)|\benvs\."
)


def functions_given_a_runner(module: str) -> dict[str, str]:
    """Qualified name -> text of the public functions with a parameter ``model_runner``."""
    source = find_source(module)
    assert source is not None
    found = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                named = {it.arg for it in ast.walk(node.args) if isinstance(it, ast.arg)}
                if "model_runner" in named and not node.name.startswith("_"):
                    found[prefix + node.name] = ast.unparse(node)

    collect(ast.parse(source.text).body, "")
    return found


@pytest.mark.parametrize("module", sorted({module for module, _ in given_runners.GIVEN}))
def test_functions_given_a_runner_that_read_scoped_values_work_for_that_runner(module: str) -> None:
    hooked = {name for it, names in given_runners.GIVEN if it == module for name in names.split()}
    functions = functions_given_a_runner(module)
    assert hooked <= functions.keys()
    assert {name for name, text in functions.items() if READS.search(text)} <= hooked


def test_methods_without_a_hook_read_no_scoped_values() -> None:
    source = find_source(model_runner.MODULE)
    assert source is not None
    plain = {name for it in model_runner.TABLE if it.is_plain for name in it.names.split()}
    methods = {
        node.name: ast.unparse(node)
        for node in ast.walk(ast.parse(source.text))
        if isinstance(node, ast.FunctionDef) and node.name in plain
    }
    assert methods.keys() == plain
    assert {name for name, text in methods.items() if READS.search(text)} == set()
