"""Functions that make all their reads at once have SGLang's own code while no scope exists."""

from __future__ import annotations

import gc
import importlib
import sys
import textwrap
import threading
from collections.abc import Iterator
from types import CodeType
from typing import Any, cast

import interpreters
import pytest
import sglang_distguard
import torch
from registry_calls import run_in_threads
from rewritten_modules import Load
from runner_calls import held_in_thread
from sglang_distguard import _core
from sglang_distguard.patching.early_reads import are_early
from sglang_distguard.process import installation

pytestmark = pytest.mark.usefixtures("no_scope")

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
    "an attribute of an object, which may be a property": "return G.field is X",
    "an attribute of the value before another read": "return X.field is X",
    "an attribute of a class or of an argument": """
        return (argument if argument is not None else Kind).field is None, X
    """,
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
    scoped, others = frozenset({"X", "Y"}), frozenset({"FLAG", "SCOPED"})
    found = are_early(code, scoped, others, frozenset({"Kind"}))
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
    _core.read_through_accessors()
    assert [it.__code__ for it in functions] == changed
    with _core.in_scope(_core.new_scope("other")):
        assert module.read() == module.late() == module.decorated() == "initial"
    assert module.read() == "default"
    plan.read_directly()
    _core.read_through_accessors()
    plan.undo()
    assert [it.__code__ is code for it, code in zip(functions, own, strict=True)] == [True] * 3


def test_code_that_was_put_in_meanwhile_stays_unless_it_is_a_copy(load: Load) -> None:
    module, plan = load(SOURCE, "_value")
    plan.read_directly()
    edited = (lambda: "edited").__code__
    module.read.__code__ = module.read.__code__.replace(co_firstlineno=1)  # as a breakpoint is set
    module.write.__code__ = edited.replace(co_varnames=("value",), co_argcount=1, co_nlocals=1)
    module.write("default")
    with _core.in_scope(_core.new_scope("other")):
        assert module.write("other") == "edited"
        vars(module)["_value"] = "default"
        assert module.read() == "initial"


@pytest.fixture
def alone(sglang: None) -> Iterator[Any]:
    """SGLang's context with the guard, in a process without scopes, after a build."""
    assert not sglang_distguard.is_installed()
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


def test_every_thread_reads_its_own_scope_from_the_first_one_on(alone: Any) -> None:
    """In each round three scopes begin at once, beside builds, when getters read directly."""
    default = alone.get_context()
    rounds, meet = 50, threading.Barrier(4)
    wrong: list[object] = []

    def scopes() -> None:
        for _ in range(rounds):
            meet.wait()
            with _core.in_scope(_core.new_scope("own")):
                own = alone.get_context()
                if own is default or alone.get_context() is not own:
                    wrong.append("own")
            if alone.get_context() is not default:
                wrong.append("default")
            meet.wait()

    def builds() -> None:
        for _ in range(rounds):
            _core.note_build()
            if not reads_directly(alone):
                wrong.append("not given")
            meet.wait()
            for _ in range(20):
                _core.note_build()
            meet.wait()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        run_in_threads(scopes, scopes, scopes, builds)
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


def test_a_scope_that_begins_while_functions_get_their_own_code_is_seen() -> None:
    """A signal handler begins it, between any two functions and before any code is set."""
    interpreters.run_well(
        """
        import pathlib, signal, sys, tempfile
        from rewritten_modules import loader
        from sglang_distguard import _core

        SOURCE = "_value = 'initial'\\n" + "\\n".join(f"def f{n}(): return _value" for n in range(3))
        left, made = [0], []

        def begins(*_):
            made.append(_core.new_scope("of a handler"))

        def audit(event, arguments):
            if event == "object.__setattr__" and arguments[1] == "__code__":
                left[0] -= 1
                if left[0] == 0:
                    signal.raise_signal(signal.SIGUSR1)

        signal.signal(signal.SIGUSR1, begins)
        sys.addaudithook(audit)
        with tempfile.TemporaryDirectory() as folder, loader(pathlib.Path(folder)) as load:
            module, plan = load(SOURCE, "_value")
            module._value = "default"
            for at in range(1, 5):
                left[0] = at
                plan.read_directly()
                left[0] = 0
                assert len(made) == (at < 4), (at, made)
                for scope in made or [_core.new_scope("afterwards")]:
                    with _core.in_scope(scope):
                        found = [getattr(module, f"f{n}")() for n in range(3)]
                    assert found == ["initial"] * 3, (at, found)
                made.clear()
                del scope
                assert _core.live_scopes() == []
        """
    )


def test_a_build_does_not_wait_for_an_import_of_another_thread(alone: Any) -> None:
    _core.new_scope("over")
    assert not reads_directly(alone)
    with held_in_thread(installation._locked()):
        _core.note_build()
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
