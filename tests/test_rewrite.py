"""Recompiling functions so that a module global is read through its accessor."""

from __future__ import annotations

import gc
import threading
import types
from typing import Any

import pytest
from rewritten_modules import Load
from sglang_distguard import _core
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import (
    Around,
    AroundMethods,
    ModulePlan,
    Needs,
    Reads,
    Scoped,
    find_source,
)
from sglang_distguard.patching.syntax import SCOPES_EXIST, accessor_name

SOURCE = """
    import contextlib
    import functools

    _value = []
    _other: int = 1


    def read():
        return _value


    def rebind(value):
        global _value
        before, _value = _value, value
        return before


    def augment():
        global _other
        _other += 1
        return _other


    def local_of_the_same_name(_value):
        return _value


    def assigned_local():
        _value = "local"
        return (lambda: _value)()


    def comprehension():
        return [_value for _ in range(1)], [_value for _value in (1,)]


    def nested():
        def inner():
            return _value

        return inner


    def default(value=_other):
        return value


    @contextlib.contextmanager
    def temporarily(value):
        global _value
        before = _value
        _value = value
        try:
            yield _value
        finally:
            _value = before


    @functools.lru_cache
    def cached():
        return _value


    class Holder:
        kept = _other

        def read(self):
            return _value

        @property
        def value(self):
            return _value

        @staticmethod
        def static():
            return _value


    earlier = nested()
    registry = [lambda: _value]
"""


def test_every_scope_has_its_own_value_and_the_default_one_has_the_modules(load: Load) -> None:
    module, _ = load(SOURCE, "_value", "_other")
    first, second = _core.new_scope("first"), _core.new_scope("second")
    with scope_active(first):
        assert module.read() == []
        assert module.read() is module._value  # from outside, too
        module.rebind("in first")
        assert module.augment() == 2
    with scope_active(second):
        assert module.read() == []
        assert module.augment() == 2
        assert module.augment() == 3
    with scope_active(first):
        assert module.read() == "in first"
    assert module.read() is module._value
    assert (module._value, module._other) == ([], 1)


def test_all_ways_to_reach_the_global_see_the_scope(load: Load) -> None:
    module, _ = load(SOURCE, "_value")
    holder = module.Holder()
    scope = _core.new_scope("all")
    with scope_active(scope):
        module.rebind("scoped")
        seen = [
            module.read(),
            module.comprehension()[0][0],
            module.nested()(),
            module.earlier(),
            module.registry[0](),
            holder.read(),
            holder.value,
            holder.static(),
            module.cached(),
        ]
        with module.temporarily("for a while") as inside:
            assert inside == "for a while"
            assert module.read() == "for a while"
        assert module.read() == "scoped"
    assert seen == ["scoped"] * len(seen)


def test_local_names_stay_local(load: Load) -> None:
    module, _ = load(SOURCE, "_value", "_other")
    with scope_active(_core.new_scope("locals")):
        assert module.local_of_the_same_name(5) == 5
        assert module.assigned_local() == "local"
        assert module.comprehension()[1] == [1]
        assert module.default() == 1


def test_functions_keep_identity_file_and_line(load: Load) -> None:
    module, plan = load(SOURCE, "_value")
    function, line = module.read, module.read.__code__.co_firstlineno
    ours = function.__code__
    plan.undo()
    assert module.read is function
    assert function.__code__ is not ours
    assert function.__code__.co_firstlineno == line
    assert function.__code__.co_filename == ours.co_filename == module.__file__


def test_undo_restores_the_original_code_objects_of_functions(load: Load) -> None:
    module, _ = load(SOURCE)
    functions = [module.read, module.earlier, module.Holder.read, module.registry[0]]
    before = [id(function.__code__) for function in functions]
    source = find_source(module.__name__)
    assert source is not None
    plan = ModulePlan(source, [Scoped(module.__name__, "_value")])
    plan.apply(module)
    assert all(id(it.__code__) != code for it, code in zip(functions, before, strict=True))
    plan.undo()
    assert [id(function.__code__) for function in functions] == before


def test_undo_reaches_functions_made_meanwhile_and_leaves_accessors_alone(load: Load) -> None:
    module, plan = load(SOURCE, "_value", "_other")
    before = {name for name in vars(module) if "distguard" not in name}
    made = module.nested()
    plan.undo()
    assert made() is module._value
    left = set(vars(module)) - before
    assert left == {accessor_name("_value"), accessor_name("_other"), SCOPES_EXIST}


def test_threads_and_their_scopes_do_not_mix(load: Load) -> None:
    module, _ = load(SOURCE, "_value")
    start = threading.Barrier(8)
    wrong: list[object] = []

    def work(number: int) -> None:
        with _core.in_scope(_core.new_scope(str(number))):
            start.wait()
            for step in range(500):
                module.rebind((number, step))
                if module.read() != (number, step):
                    wrong.append(module.read())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert module._value == []


def test_a_scope_without_references_frees_its_values(load: Load) -> None:
    import weakref

    module, _ = load(SOURCE, "_value")

    class Big:
        pass

    scope = _core.new_scope("short")
    with scope_active(scope):
        big = Big()
        big.scope = scope  # type: ignore[attr-defined]
        module.rebind(big)
    alive = weakref.ref(big)
    del big, scope
    gc.collect()
    assert alive() is None


ATTRIBUTES = """
    class Pool:
        _shared = None
        _size: int = 2

        @classmethod
        def grow(cls):
            cls._size += 1
            return [Pool._size for _ in range(1)][0]

        @classmethod
        def share(cls, value):
            before = cls._shared
            cls._shared = value
            return before

        @staticmethod
        def size():
            return Pool._size

    class Other:
        _size = 7

        @classmethod
        def size(cls):
            return Pool._size
"""


def test_every_scope_has_its_own_value_of_a_class_attribute(load: Load) -> None:
    module, plan = load(ATTRIBUTES, "Pool._shared", "Pool._size")
    pool = module.Pool
    first, second = _core.new_scope("first"), _core.new_scope("second")
    with scope_active(first):
        assert pool.share("of the first") is None
        assert (pool.grow(), pool.grow(), pool.size()) == (3, 4, 4)
        assert module.Other.size() == 4
    with scope_active(second):
        assert pool.share("of the second") is None
        assert pool.size() == 2
    assert (pool._shared, pool._size, pool.size()) == (None, 2, 2)
    assert pool.grow() == 3
    assert pool._size == 3
    with scope_active(first):
        assert pool.share(None) == "of the first"
        plan.undo()
        assert pool.size() == 3
    left = {name for name in vars(pool) if "distguard" in name}
    assert left == {accessor_name("_shared"), accessor_name("_size")}


def test_a_class_attribute_that_is_reached_through_something_else_is_refused(load: Load) -> None:
    through_self = (
        ATTRIBUTES
        + """
    class Through(Pool):
        def read(self):
            return self._shared
"""
    )
    with pytest.raises(NotSupported, match=r"Through\.read uses \['_shared'\]"):
        load(through_self, "Pool._shared")
    with pytest.raises(NotSupported, match=r"has no Pool\._gone"):
        load(ATTRIBUTES, "Pool._gone")


READER = """
    import rewritten_0
    import rewritten_0 as other
    from rewritten_0 import Holder, read


    def imports():
        from rewritten_0 import _value, read as unchanged

        def inner():
            return _value

        return inner(), unchanged is read


    def imports_as():
        from rewritten_0 import _value as mine

        return mine


    def attribute():
        return rewritten_0._value, other._value


    def writes(value):
        other._value = value


    def not_the_module(other):
        return other._value


    def of_class():
        return other.Holder.kept, Holder.kept


    def shadowed():
        rewritten_0 = other.Holder
        rewritten_0._value = "an attribute"
        return rewritten_0._value
"""


def test_another_modules_scoped_global_is_read_and_written_in_the_scope(load: Load) -> None:
    owner, _ = load(SOURCE, "_value", "Holder.kept")
    reader, plan = load(
        READER,
        lambda name: Reads(name, owner.__name__, "_value"),
        lambda name: Reads(name, f"{owner.__name__}.Holder", "kept"),
    )
    function = reader.attribute
    with scope_active(_core.new_scope("elsewhere")):
        owner.rebind("scoped")
        assert reader.imports() == ("scoped", True)
        assert reader.imports_as() == "scoped"
        assert reader.attribute() == ("scoped", "scoped")
        reader.writes("written")
        assert owner.read() == "written"
        assert reader.not_the_module(types.SimpleNamespace(_value=1)) == 1
        assert reader.shadowed() == "an attribute"
        owner.Holder._distguard_scoped_kept.value = "kept"
        assert reader.of_class() == ("kept", "kept")
        plan.undo()
        assert reader.attribute is function
        assert reader.attribute() == (owner._value, owner._value)
        assert reader.imports()[0] is owner._value
    assert owner._value == []


@pytest.mark.parametrize(
    "line",
    [
        "from rewritten_0 import _value",
        "import rewritten_0; copy = rewritten_0._value",
        "import rewritten_0\ndef f(value=rewritten_0._value): pass",
        "import rewritten_0\nclass C:\n    value = rewritten_0._value",
    ],
)
def test_a_copy_made_at_import_is_refused(load: Load, line: str) -> None:
    owner, _ = load(SOURCE, "_value")
    with pytest.raises(NotSupported, match=r"copies rewritten_0\._value when it is imported"):
        load(line, lambda name: Reads(name, owner.__name__, "_value"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f():\n    return _value\n", "has no _value"),
        ("_value = 1\n_value = 2\ndef f():\n    return _value\n", "assigned 2 times"),
        ("_value = 1\ndef f():\n    global _value\n    import os as _value\n", "by Import"),
        ("_value = 1\ndef f():\n    global _value\n    def _value(): pass\n", "by FunctionDef"),
    ],
)
def test_what_cannot_be_redirected_is_refused(load: Load, source: str, reason: str) -> None:
    with pytest.raises(NotSupported, match=reason):
        load(source, "_value")


def test_a_missing_function_is_named(load: Load) -> None:
    with pytest.raises(NotSupported, match="gone"):
        load(SOURCE, lambda name: Around(name, "gone", lambda original: original))
    with pytest.raises(NotSupported, match=r"Holder\.gone"):
        load(SOURCE, lambda name: Needs(name, "Holder.gone"))


def test_hooks_see_every_call_and_generators_stay_generators(load: Load) -> None:
    calls: list[str] = []

    def around(original: Any) -> Any:
        def hook(*args: Any, **kwargs: Any) -> Any:
            calls.append(original.__name__)
            return original(*args, **kwargs)

        return hook

    def around_generator(original: Any) -> Any:
        def hook(value: Any) -> Any:
            calls.append("temporarily")
            yield from original(value)

        return hook

    module, plan = load(
        SOURCE + "\n    class Made:\n        def __init__(self):\n            pass\n"
        "        def public(self):\n            return _value\n"
        "        def _private(self):\n            return _value\n",
        "_value",
        lambda name: Around(name, "read", around),
        lambda name: Around(name, "temporarily", around_generator),
        lambda name: AroundMethods(name, "Made", make=around, make_init=around),
    )
    reference = module.read
    reference()
    with module.temporarily("x"):
        assert module.read() == "x"
    made = module.Made()
    made.public()
    made._private()
    assert calls == ["read", "temporarily", "read", "__init__", "public"]
    plan.undo()
    reference()
    made.public()
    assert len(calls) == 5
