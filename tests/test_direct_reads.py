"""While no scope exists changed code reads a global directly, as SGLang does, and not one read longer."""

from __future__ import annotations

import sys
import threading
from functools import partial
from types import CodeType, FrameType
from typing import Any

import pytest
from registry_calls import run_in_threads
from rewritten_modules import Load
from sglang_distguard import _core
from sglang_distguard._core import OwnFlag, ScopedGlobal
from sglang_distguard.patching import Raised
from sglang_distguard.patching.syntax import SCOPES_EXIST, accessor_name

pytestmark = pytest.mark.usefixtures("no_scope")

SOURCE = """
    import types

    _value = "initial"
    _flag = False
    _kinds = types.SimpleNamespace(one=1)


    def read():
        return _value


    def read_after_a_call():
        str()
        return _value


    def flag():
        return _flag


    def write(value):
        global _value
        _value = value


    def each(count):
        for _ in range(count):
            yield _value


    def by_pattern(given):
        match given:
            case _kinds.one:
                return "one"
            case {_kinds.one: "two"} if _value:
                return _value
            case _:
                return "other"
"""


class Uncalled:
    """In place of an accessor: code that reads it fails."""

    @property
    def value(self) -> object:
        raise AssertionError("an accessor was read")


def test_an_accessor_is_read_only_while_a_scope_exists(load: Load) -> None:
    module: Any
    module, _ = load(SOURCE, "_value")
    accessor = vars(module)[accessor_name("_value")]
    setattr(module, accessor_name("_value"), Uncalled())
    module._value = "default"
    assert module.read_after_a_call() == "default"
    scope = _core.new_scope("other")
    with pytest.raises(AssertionError, match="an accessor was read"):
        module.read_after_a_call()
    setattr(module, accessor_name("_value"), accessor)
    with _core.in_scope(scope):
        assert module.read_after_a_call() == "initial"
    assert module.read_after_a_call() == "default"
    del scope
    setattr(module, accessor_name("_value"), Uncalled())
    assert module.read_after_a_call() == "default"
    del module._value
    with pytest.raises(NameError, match="'_value'"):
        module.read_after_a_call()


def test_a_suspended_frame_reads_its_scope_from_the_first_scope_on(load: Load) -> None:
    module, _ = load(SOURCE, "_value")
    module.write("default")
    values = module.each(5)
    assert next(values) == "default"
    scope = _core.new_scope("other")
    assert next(values) == "default"
    with _core.in_scope(scope):
        assert next(values) == "initial"
        module.write("own")
        assert next(values) == "own"
    assert next(values) == "default"


def test_a_scope_that_begins_between_any_two_instructions_of_a_read_is_seen(load: Load) -> None:
    """At each instruction of the function a scope is created and entered, as a hook might do."""
    module, _ = load(SOURCE, "_value")
    module.write("default")
    code: CodeType = module.read_after_a_call.__code__

    def value_if_entered_at(step: int) -> object:
        left = [step]
        entered: list[Any] = []

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code is not code:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                left[0] -= 1
                if left[0] == 0:
                    entered.append(_core.in_scope(_core.new_scope("begun")))
                    entered[0].__enter__()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            found = module.read_after_a_call()
        finally:
            sys.settrace(before)
            if entered:
                entered[0].__exit__(None, None, None)
        return found if entered else None

    found = [value_if_entered_at(step) for step in range(1, 16)]
    # Entered before the flag is read: the scope's value. Afterwards the read has begun.
    assert found[0] == "initial"
    assert None in found
    assert set(found) == {"initial", "default", None}
    assert found == sorted(found, key=["initial", "default", None].index)
    assert module.read_after_a_call() == "default"


def test_every_execution_of_a_module_is_told(load: Load) -> None:
    namespaces: list[dict[str, Any]] = [{"__name__": "told", "X": number} for number in range(2)]
    accessors = [ScopedGlobal(it, "X", lambda: None) for it in namespaces]
    assert [it[SCOPES_EXIST] for it in namespaces] == [False, False]
    scope = _core.new_scope("other")
    assert [it[SCOPES_EXIST] for it in namespaces] == [True, True]
    late: dict[str, Any] = {"__name__": "late", "X": 2}
    accessors.append(ScopedGlobal(late, "X", lambda: None))
    assert late[SCOPES_EXIST] is True
    second = _core.new_scope("second")
    del scope
    assert late[SCOPES_EXIST] is True
    del second
    assert [it[SCOPES_EXIST] for it in (*namespaces, late)] == [False] * 3


def test_threads_that_create_and_drop_scopes_always_read_their_own(load: Load) -> None:
    module, _ = load(SOURCE, "_value")
    module.write("default")
    start = threading.Barrier(4)
    wrong: list[object] = []

    def work(number: int) -> None:
        start.wait()
        for turn in range(300):
            with _core.in_scope(_core.new_scope(f"{number}")):
                found = [module.read()]
                module.write((number, turn))
                found.append(module.read())
            found.append(module.read())
            if found != ["initial", (number, turn), "default"]:
                wrong.append(found)

    run_in_threads(*(partial(work, number) for number in range(4)))
    assert wrong == []


def test_a_flag_of_the_process_is_always_read_through_its_accessor(load: Load) -> None:
    here: list[bool] = []
    module, _ = load(SOURCE, lambda name: Raised(name, "_flag", lambda: bool(here)))
    assert isinstance(vars(module)[accessor_name("_flag")], OwnFlag)
    assert module.flag() is False
    here.append(True)
    assert module.flag() is True


def test_patterns_of_match_read_the_scope(load: Load) -> None:
    module, _ = load(SOURCE, "_kinds", "_value")
    assert module.by_pattern(1) == "one"
    assert module.by_pattern({1: "two"}) == "initial"
    with _core.in_scope(_core.new_scope("other")):
        module._kinds.one = 3
        assert module.by_pattern(3) == "one"
        assert module.by_pattern(1) == "other"
    assert module.by_pattern(1) == "one"
