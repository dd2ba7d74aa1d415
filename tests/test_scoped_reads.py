"""An accessor caches, and still returns the present value after every kind of change."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from sglang_distguard import _core
from sglang_distguard._core import OwnFlag, ScopedGlobal


def read(accessor: ScopedGlobal) -> Any:
    try:
        return accessor.value
    except NameError:
        return "missing"


MODULE: Any = ModuleType("scoped_reads")


def assign(value: object) -> None:
    MODULE.X = value  # CPython specialises it


#: Every way in which the dictionary of a module changes.
CHANGES: dict[str, Callable[[dict[str, Any], object], object]] = {
    "item": lambda it, value: it.__setitem__("X", value),
    "update": lambda it, value: it.update(X=value),
    "merge": lambda it, value: it.__ior__({"X": value}),
    "setdefault": lambda it, value: it.setdefault("X", value),
    "delete": lambda it, _: it.pop("X", None),
    "clear": lambda it, _: it.clear(),
    "another name": lambda it, value: it.__setitem__("Y", value),
    "last": lambda it, _: it.popitem() if it else None,
    "assignment": lambda it, value: exec("global X\nX = value", it, {"value": value}),
    "attribute": lambda it, value: setattr(MODULE, "X", value),
    "attribute in code": lambda it, value: assign(value),
    "attribute deleted": lambda it, _: delattr(MODULE, "X") if "X" in it else None,
    "many": lambda it, value: it.update({f"n{number}": value for number in range(40)}),
}


def test_the_default_scopes_present_value_is_read_after_every_change() -> None:
    choose = random.Random(0)
    namespace = vars(MODULE)
    accessor = ScopedGlobal(namespace, "X", lambda: "initial")
    for number in range(20_000):
        CHANGES[choose.choice(list(CHANGES))](namespace, object())
        for _ in range(choose.randrange(3)):  # also several changes between two reads
            assert read(accessor) is namespace.get("X", "missing"), number


def test_a_value_is_not_kept_alive_by_having_been_read() -> None:
    namespace: dict[str, Any] = {"__name__": "scoped_reads", "X": set()}
    accessor = ScopedGlobal(namespace, "X", lambda: None)
    ended: list[bool] = []

    class Value:
        def __del__(self) -> None:
            ended.append(True)

    accessor.value = Value()
    assert isinstance(accessor.value, Value)
    del namespace["X"]
    assert ended == [True]
    assert read(accessor) == "missing"


def test_reads_and_writes_follow_the_current_scope() -> None:
    namespace: dict[str, Any] = {"__name__": "scoped_reads", "X": "default"}
    accessor = ScopedGlobal(namespace, "X", lambda: "initial")
    assert accessor.value == "default"
    scope = _core.new_scope("reads")
    with _core.in_scope(scope):
        assert accessor.value == "initial"
        accessor.value = "own"
        assert accessor.value == "own"
        with _core.in_scope(None):
            assert accessor.value == "default"
        del accessor.value
        with pytest.raises(NameError, match="'X'"):
            _ = accessor.value
    assert accessor.value == namespace["X"] == "default"


def test_attributes_other_than_the_value_are_as_in_any_object() -> None:
    accessor = ScopedGlobal({"__name__": "scoped_reads", "X": 0}, "X", lambda: None)
    assert getattr(accessor, "".join(["val", "ue"])) == 0  # not the interned string
    assert repr(accessor) == "<ScopedGlobal X>"
    with pytest.raises(AttributeError, match="values"):
        _ = accessor.values  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        _ = getattr(accessor, 0)  # type: ignore[arg-type]


def test_an_own_flag_is_true_when_set_here_or_in_the_process() -> None:
    namespace: dict[str, Any] = {"FLAG": False}
    here: list[bool] = []
    flag = OwnFlag(namespace, "FLAG", lambda: bool(here))
    assert flag.value is False
    here.append(True)
    assert flag.value is True
    assert namespace["FLAG"] is False
    here.clear()
    flag.value = True
    assert flag.value is namespace["FLAG"] is True
    del namespace["FLAG"]
    with pytest.raises(NameError, match="'FLAG'"):
        _ = flag.value
