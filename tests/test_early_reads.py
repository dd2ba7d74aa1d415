"""Functions that make all their reads at once have SGLang's own code while no scope exists."""

from __future__ import annotations

import gc
import importlib
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any, cast

import pytest
import sglang_distguard
import torch
from registry_calls import run_in_threads
from rewritten_modules import Load, loader
from sglang_distguard import _core
from sglang_distguard.patching.early_reads import are_early
from sglang_distguard.patching.plan import ModulePlan
from sglang_distguard.process import installation

EARLY = {
    "a getter": "return X",
    "an attribute of the value": "return X.field",
    "a call after the read": "return X.get(1)",
    "two globals": "return X if X is not None else Y",
    "a write and a read": """
        global X
        if X is None:
            X = Kind.DEFAULT
        return X
    """,
    "an assertion": """
        assert X is not None, f"none: {X!r}"
        return X
    """,
    "an error instead of the second read": """
        if X is None:
            raise ValueError(str(1))
        return X
    """,
}
LATE = {
    "a call before the read": """
        first()
        return X
    """,
    "a call between two reads": """
        first(X)
        return Y
    """,
    "a call in one branch": """
        if argument is None:
            first()
        return X
    """,
    "a loop": """
        for _ in argument:
            X.append(1)
    """,
    "a test of an object's truth": "return X if argument else X",
    "an attribute of an argument": "return argument.field, X",
    "a generator": "yield X",
    "a function in the function": "return lambda: X",
    "a comprehension": "return [X for _ in argument]",
    "a with block": """
        with argument:
            return X
    """,
    "an exception handler": """
        try:
            return X
        except KeyError:
            return X
    """,
    "a flag beside it": "return FLAG and X",
    "an attribute of another owner beside it": "return X, Kind.SCOPED",
    "nothing scoped": "return Z",
}


def function_code(body: str) -> CodeType:
    text = "def f(argument=None):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    module = compile(text, "<test>", "exec")
    return next(it for it in module.co_consts if isinstance(it, CodeType))


@pytest.mark.parametrize("what", [*EARLY, *LATE])
def test_reads_are_early_when_no_other_code_can_run_before_them(what: str) -> None:
    code = function_code({**EARLY, **LATE}[what])
    found = are_early(code, frozenset({"X", "Y"}), frozenset({"FLAG", "SCOPED"}))
    assert found is (what in EARLY)


SOURCE = """
    _value = "initial"


    def read():
        return _value


    def write(value):
        global _value
        _value = value


    def late(before=str):
        before()
        return _value


    def wrapped(function):
        return lambda: function()


    @wrapped
    def decorated():
        return _value
"""


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    with loader(tmp_path) as load:
        yield load


def test_only_such_functions_get_their_own_code_back_and_lose_it_again(load: Load) -> None:
    module: Any
    module, plan = load(SOURCE, "_value")
    functions = [module.read, module.write, module.late]
    plan.undo()
    own = [it.__code__ for it in functions]
    plan.apply(module)
    changed = [it.__code__ for it in functions]
    plan.read_directly()
    assert [it.__code__ is code for it, code in zip(functions, own, strict=True)] == [
        True,
        True,
        False,
    ]
    assert module.decorated() == "initial"  # its name means another function
    module.write("default")
    assert module.read() == module.late() == module.decorated() == "default"
    plan.read_through_accessors()
    assert [it.__code__ for it in functions] == changed
    with _core.in_scope(_core.new_scope("other")):
        assert module.read() == module.late() == module.decorated() == "initial"
    assert module.read() == "default"
    plan.read_directly()
    plan.undo()
    assert [it.__code__ is code for it, code in zip(functions, own, strict=True)] == [True] * 3


def test_code_that_was_put_in_meanwhile_stays(load: Load) -> None:
    module, plan = load(SOURCE, "_value")
    plan.read_directly()
    module.read.__code__ = (lambda: "edited").__code__
    plan.read_through_accessors()
    assert module.read() == "edited"


@pytest.fixture
def alone(sglang: None) -> Iterator[Any]:
    """SGLang's context with the guard, in a process without scopes, after a build."""
    gc.collect()
    assert not sglang_distguard.is_installed()
    assert not _core.scopes_exist()
    sglang_distguard.install()
    _core.note_build()
    from sglang.srt import runtime_context

    yield runtime_context
    sglang_distguard.uninstall()


def reads_directly(module: Any) -> bool:
    return "_CONTEXT" in module.get_context.__code__.co_names


def test_a_build_without_scopes_lets_getters_read_directly_until_the_first_scope(
    alone: Any,
) -> None:
    default = alone.get_context()
    assert reads_directly(alone)
    scope = _core.new_scope("first")
    assert not reads_directly(alone)
    with _core.in_scope(scope):
        assert alone.get_context() is not default
    _core.note_build()  # of a runner beside it
    assert not reads_directly(alone)
    del scope
    gc.collect()
    assert alone.get_context() is default
    assert not reads_directly(alone)
    _core.note_build()
    assert reads_directly(alone)
    assert alone.get_context() is default


def test_every_thread_reads_its_own_scope_however_they_begin_and_end(alone: Any) -> None:
    default = alone.get_context()
    start = threading.Barrier(4)
    wrong: list[object] = []

    def scopes(number: int) -> None:
        start.wait()
        for turn in range(100):
            with _core.in_scope(_core.new_scope(f"{number} {turn}")):
                own = alone.get_context()
                if own is default or alone.get_context() is not own:
                    wrong.append((number, turn))
            if alone.get_context() is not default:
                wrong.append((number, turn, "default"))

    def builds() -> None:
        start.wait()
        for _ in range(400):
            _core.note_build()

    run_in_threads(*(partial(scopes, number) for number in range(3)), builds)
    assert wrong == []


def test_a_scope_does_not_begin_when_getters_would_still_read_directly(
    alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt while code is changed back: the next scope begins after another attempt."""
    with monkeypatch.context() as patch:
        patch.setattr(ModulePlan, "read_through_accessors", lambda _: interrupt())
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                _core.new_scope("first")
            assert not _core.scopes_exist()
            assert _core.live_scopes() == []
    default = alone.get_context()
    with _core.in_scope(_core.new_scope("second")):
        assert alone.get_context() is not default


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_build_does_not_wait_for_an_import_of_another_thread(alone: Any) -> None:
    _core.new_scope("over")
    assert not reads_directly(alone)
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with installation._locked():
            held.set()
            end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        _core.note_build()
    finally:
        end.set()
        thread.join()
    assert not reads_directly(alone)


def test_functions_of_a_module_that_is_executed_again_read_their_scope(alone: Any) -> None:
    from sglang.srt.model_executor import forward_context

    old = forward_context.has_forward_context
    importlib.reload(forward_context)
    new = forward_context.has_forward_context
    assert old is not new
    with _core.in_scope(_core.new_scope("own")):
        forward_context.set_forward_context(cast(Any, object()))
        assert old()
        assert new()
    assert not old()
    assert not new()


def test_what_was_compiled_before_the_first_scope_is_compiled_again_for_it(alone: Any) -> None:
    from sglang.srt.model_executor.forward_context import has_forward_context, set_forward_context

    def compute(x: torch.Tensor) -> torch.Tensor:
        return -x if has_forward_context() else x

    torch._dynamo.reset()
    try:
        run = torch.compile(compute, backend="eager", fullgraph=True)
        assert run(torch.ones(1)).item() == 1
        with _core.in_scope(_core.new_scope("own")):
            set_forward_context(cast(Any, object()))
            assert run(torch.ones(1)).item() == -1
        assert run(torch.ones(1)).item() == 1
    finally:
        torch._dynamo.reset()
