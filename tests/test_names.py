"""Python's own symbol tables decide which names of a function mean a scoped global."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rewritten_modules import loader
from sglang_distguard import _core
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import Within

LOCALS = """
_value = "global"


def by_match(given):
    match given:
        case {"a": _value}:
            return _value
        case [_value, *_]:
            return _value
        case {**_value}:
            return _value


def by_star(given):
    match given:
        case [_, *_value]:
            return _value


def by_walrus(given):
    [(_value := it) for it in given]
    return _value


def by_comprehension(given):
    return [_value for _value in given]


def by_except():
    try:
        raise ValueError("local")
    except ValueError as _value:
        return str(_value)


def by_import():
    import sys as _value
    return _value.__name__


def by_class(given):
    class Made:
        _value = given
    return Made._value


def by_nested(given):
    def inner():
        nonlocal _value
        _value = given
    _value = None
    inner()
    return _value


def by_delete(given):
    _value = given
    del _value
    return given
"""
GLOBALS = """
_value = "global"


def read():
    return _value


def in_comprehension(given):
    return [(_value, _value) for _ in given]


def over(given):
    return [it for it in _value for it in it]


def in_lambda():
    return (lambda given=_value: (given, _value))()


def in_inner():
    def inner():
        return _value
    return inner()


def write(given):
    global _value
    _value = given


def loop(given):
    global _value
    for _value in given:
        pass


def beside_a_comprehension(given):
    return [_value for _value in given], {_value: _value for _value in given}, _value

def beside_a_local():
    def inner(_value):
        return _value
    return inner(1), _value
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As ``loader``; without changes, ``_value`` is scoped."""
    monkeypatch.syspath_prepend(str(tmp_path))
    with loader(tmp_path) as load:
        yield lambda source, *changes: load(source, *(changes or ("_value",)))


def test_names_that_a_function_binds_stay_its_own(load: Any) -> None:
    module, _ = load(LOCALS)
    with scope_active(_core.new_scope("other")):
        assert module.by_match({"a": 1}) == 1
        assert module.by_match([2, 3]) == 2
        assert module.by_match({"b": 3}) == {"b": 3}
        assert module.by_star([1, 2, 3]) == [2, 3]
        assert module.by_walrus([1, 2]) == 2
        assert module.by_comprehension([1, 2]) == [1, 2]
        assert module.by_except() == "local"
        assert module.by_import() == "sys"
        assert module.by_class(4) == 4
        assert module.by_nested(5) == 5
        assert module.by_delete(6) == 6
    assert module._value == "global"


def test_names_that_mean_the_global_read_and_write_the_scopes_value(load: Any) -> None:
    module, _ = load(GLOBALS)
    scope = _core.new_scope("other")
    with scope_active(scope):
        module.write("own")
        assert module.read() == "own"
        assert module.in_comprehension([1]) == [("own", "own")]
        assert module.over(None) == list("own")
        assert module.in_lambda() == ("own", "own")
        assert module.in_inner() == "own"
        assert module.beside_a_local() == (1, "own")
        assert module.beside_a_comprehension([1, 2]) == ([1, 2], {1: 1, 2: 2}, "own")
        module.loop([1, 2])
        assert module.read() == 2
    assert module.read() == "global"


@pytest.mark.parametrize(
    "binding",
    [
        "match given:\n        case [_value]: pass",
        "match given:\n        case {**_value}: pass",
        "match given:\n        case [*_value]: pass",
        "[(_value := it) for it in given]",
        "import sys as _value",
        "def _value(): pass",
        "class _value: pass",
        "try: pass\n    except ValueError as _value: pass",
    ],
)
def test_a_binding_of_the_global_that_has_no_form_as_an_attribute_is_refused(
    load: Any, binding: str
) -> None:
    with pytest.raises(NotSupported, match="binds the global '_value'"):
        load(f"_value = 1\n\n\ndef f(given):\n    global _value\n    {binding}\n")


KEPT = """
import sys

import holder_of_frames

_value = None


def f():
    global _value
    _value = 1
    return _value


holder_of_frames.frames.append(sys._getframe())
"""


def test_a_module_whose_frame_a_traceback_keeps_alive_is_rewritten(
    load: Any, tmp_path: Path
) -> None:
    (tmp_path / "holder_of_frames.py").write_text("frames = []\n")
    module, _ = load(KEPT)
    holder = sys.modules.pop("holder_of_frames")
    assert holder.frames
    with scope_active(_core.new_scope("other")):
        assert module.f() == 1
    assert module._value is None
    holder.frames.clear()  # they also refer to this test's frame


WRAPPED = """
import contextlib


def plain(self, given, /, more=2, *, named=3, **others):
    \"\"\"What it says.\"\"\"
    return self, given, more, named, others


@contextlib.contextmanager
def generator(self):
    yield self
    self.append("after")


def fails(self):
    raise ValueError(self)
"""


def test_a_body_in_a_with_block_is_the_same_function_from_outside(load: Any) -> None:
    import inspect

    seen: list[str] = []

    class Block:
        def __init__(self, given: Any) -> None:
            seen.append(f"called {given}")

        def __enter__(self) -> None:
            seen.append("entered")

        def __exit__(self, *_error: object) -> None:
            seen.append("left")

    names = ("plain", "generator", "fails")
    changes = [lambda name, it=it: Within(name, it, Block) for it in names]
    module, plan = load(WRAPPED, *changes)
    assert module.plain("me", 1, named=4, other=5) == ("me", 1, 2, 4, {"other": 5})
    assert seen == ["called me", "entered", "left"]
    assert str(inspect.signature(module.plain)) == "(self, given, /, more=2, *, named=3, **others)"
    assert module.plain.__doc__ == "What it says."
    assert inspect.getsource(module.plain).startswith("def plain(self, given, /, more=2")
    with module.generator([]) as given:
        assert seen[-1] == "entered"
    assert given == ["after"]
    assert seen[-1] == "left"
    with pytest.raises(ValueError, match="x") as caught:
        module.fails("x")
    names_of_frames = [it.name for it in caught.traceback]
    assert names_of_frames[-1] == "fails"
    assert "raise ValueError(self)" in str(caught.traceback[-1].statement)
    assert seen[-1] == "left"
    plan.undo()
    seen.clear()
    module.plain("me", 1)
    assert seen == []
