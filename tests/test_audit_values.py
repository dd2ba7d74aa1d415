"""The audit sees a change wherever Python keeps a value: closures, defaults, caches, libraries."""

from __future__ import annotations

import contextvars
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang_distguard.audit import duties, findings, libraries, observe, values
from sglang_distguard.audit.findings import Open
from sglang_distguard.audit.graph import BYTES, Reader
from sglang_distguard.audit.runs import Run, Watch, differences
from sglang_distguard.audit.traces import tracing

HERE = "sglang.made_up"

TEXT = """
import collections
import contextvars
import ctypes
import functools
import random
import re
import types

import numpy
import torch

def once(function):
    made = []
    def wrapped():
        if not made:
            made.append(function())
        return made[0]
    return wrapped

@once
def list_in_cell(): return 1

def counter():
    calls = 0
    def count():
        nonlocal calls
        calls += 1
    return count

number_in_cell = counter()

def default(key, known={}):
    known[key] = 1

def keyword_default(*, known=[]):
    known.append(1)

def wrap(function):
    @functools.wraps(function)
    def wrapped(*arguments): return function(*arguments)
    return wrapped

@wrap
@functools.lru_cache
def cache_under_a_wrapper(n): return n

@functools.cache
def dict_in_a_cache(): return {}

@functools.lru_cache(maxsize=4)
def dict_in_a_bounded_cache(n): return {}

dict_in_a_cache()
dict_in_a_bounded_cache(1)

@functools.singledispatch
def dispatched(it): return it

bound = functools.partial(setattr, types.SimpleNamespace(), "x")
append = [].append

class Kept:
    def __init__(self): self.all = {}

    @property
    def in_a_property(self, known=[]): return known

    def method(self, known=[]): known.append(1)

    @classmethod
    def of_class(cls, known=[]): known.append(1)

    class Inner:
        known = []

kept = Kept()
bound_method = kept.method

def class_of(name):
    class Local:
        seen = []
    return Local

registry = {"local": class_of("local")}
deep = {"a": [{"b": [{"c": [{"d": [{"e": []}]}]}]}]}
view = types.MappingProxyType(deep)
ordered = collections.OrderedDict(a=[[[[]]]])
variable = contextvars.ContextVar("made_up")
listed = contextvars.ContextVar("made_up too", default=[])
generator = numpy.random.default_rng(0)
old_generator = numpy.random.RandomState(0)
dice = random.Random(0)
torch_generator = torch.Generator()
array = numpy.zeros(3)
tensor = torch.zeros(3)
inference = {"x": torch.zeros(3)}
walk = iter([1, 2, 3])
def numbers():
    n = 0
    while True:
        n += 1
        yield n
running = numbers()
next(running)
raw = ctypes.c_int(0)
library = types.SimpleNamespace(a=types.SimpleNamespace(b=[]))
counted = collections.Counter()
queue = collections.deque([[[[]]]])
"""


@pytest.fixture
def module() -> Iterator[Any]:
    made: Any = types.ModuleType(HERE)
    sys.modules[HERE] = made
    exec(compile(TEXT, "made_up.py", "exec"), vars(made))
    yield made
    del sys.modules[HERE]


def changed(before: observe.Observation, after: observe.Observation | None = None) -> set[str]:
    found = differences(before, after or observe.observe(), phase="load", runner="first")
    return {it.name for it in found if it.module == HERE}


#: Name of a global, and a line that changes what it holds, and nothing else.
LINES = [
    ("list_in_cell", "list_in_cell()"),
    ("number_in_cell", "number_in_cell()"),
    ("default", "default('a')"),
    ("keyword_default", "keyword_default()"),
    ("cache_under_a_wrapper", "cache_under_a_wrapper(1)"),
    ("dict_in_a_cache", "dict_in_a_cache()['a'] = 1"),
    ("dict_in_a_bounded_cache", "dict_in_a_bounded_cache(1)['a'] = 1"),
    ("dispatched", "dispatched.register(int, print)"),
    ("bound", "bound(1)"),
    ("append", "append(1)"),
    ("Kept.in_a_property", "kept.in_a_property.append(1)"),
    ("Kept.of_class", "Kept.of_class()"),
    ("Kept.Inner.known", "Kept.Inner.known.append(1)"),
    ("Kept.Inner.new", "Kept.Inner.new = 1"),
    ("registry", "registry['local'].seen.append(1)"),
    ("registry", "registry['local'].new = 1"),
    ("ordered", "ordered['a'][0][0][0].append(1)"),
    ("queue", "queue[0][0][0].append(1)"),
    ("variable", "variable.set(1)"),
    ("listed", "listed.get().append(1)"),
    ("generator", "generator.random()"),
    ("old_generator", "old_generator.rand()"),
    ("dice", "dice.random()"),
    ("torch_generator", "torch.rand(1, generator=torch_generator)"),
    ("array", "array[0] = 1"),
    ("tensor", "tensor.data[0] = 1"),
    ("inference", "inference['x'].numpy()[0] = 1"),
    ("walk", "next(walk)"),
    ("running", "next(running)"),
    ("raw", "raw.value = 1"),
    ("library", "library.a.b.append(1)"),
    ("counted", "counted['a'] += 1"),
    ("computed", "globals()['com' + 'puted'] = 1"),
    ("Kept.computed", "setattr(Kept, 'com' + 'puted', 1)"),
]


def made_up() -> observe.Observation:
    """As ``observe``, which takes a second, of the module's own globals."""
    reader = Reader()
    own = observe.globals_of(lambda it: it == HERE)
    return {key: values.value_of(thing, reader) for key, thing in own}


def test_a_change_is_seen_wherever_the_value_is_kept(module: Any) -> None:
    first = observe.observe()
    assert changed(first) == set()
    for name, line in LINES:
        before = made_up()
        exec(line, vars(module))
        assert changed(before, made_up()) == {name}
    assert changed(first) == {name for name, _ in LINES}


def test_what_the_compiler_keeps_in_a_compiled_function_is_a_readers_duty(module: Any) -> None:
    kind = type("Box", (), {"__module__": "torch._dynamo.made_up"})
    module.compiled = types.SimpleNamespace(box=kind(), other=types.SimpleNamespace())
    before = observe.observe()
    module.compiled.box.changed = 1
    assert changed(before) == set()
    assert ("torch._dynamo", "*") in duties.REASONS
    module.compiled.other.changed = 1
    assert changed(before) == {"compiled"}


@pytest.mark.parametrize("line", ["deep['a'][0]['b'][0]['c'][0]['d'][0]['e'].append(1)"])
def test_every_global_that_holds_what_changed_is_named(module: Any, line: str) -> None:
    before = observe.observe()
    exec(line, vars(module))
    assert changed(before) == {"deep", "view"}


def test_a_change_says_where_in_the_global_it_is(module: Any) -> None:
    before = observe.observe()
    module.deep["a"][0]["b"].append(1)
    module.default("x")
    found = {
        it.name: (it.before, it.after)
        for it in differences(before, observe.observe(), phase="load", runner="first")
        if it.module == HERE
    }
    assert found["deep"] == ("['a'][0]['b']: list of 1", "['a'][0]['b']: list of 2")
    assert found["default"] == ("<defaults>: dict of 0", "<defaults>: dict of 1")


def test_functions_that_hold_what_can_change_are_listed(module: Any) -> None:
    kinds = {name: kind for _, name, kind in Watch().take().kinds if _ == HERE}
    closures = {name for name, kind in kinds.items() if kind == "closure"}
    assert {
        *("list_in_cell", "default", "keyword_default", "cache_under_a_wrapper", "bound_method"),
        *("Kept.in_a_property", "Kept.method", "Kept.of_class"),
    } <= closures
    assert "once" not in kinds


class Chain:
    def __init__(self, length: int) -> None:
        self.next = Chain(length - 1) if length else None


@pytest.mark.parametrize(
    ("thing", "is_cut"),
    [
        (Chain(values.DEPTH - 2), False),
        (Chain(values.DEPTH), True),
        ([{} for _ in range(values.OBJECTS - 2)], False),
        ([{} for _ in range(values.OBJECTS)], True),
        (bytearray(BYTES), False),
        (bytearray(BYTES + 1), True),
    ],
    ids=["short chain", "long chain", "few objects", "many objects", "few bytes", "many bytes"],
)
def test_what_is_beyond_the_bounds_is_reported(
    module: Any, monkeypatch: pytest.MonkeyPatch, thing: Any, is_cut: bool
) -> None:
    module.thing = thing
    run = Watch().take()
    assert ((HERE, "thing") in run.cut) == is_cut
    (found,) = [it for it in findings.find([run]) if (it.module, it.name) == (HERE, "thing")] or [
        None
    ]
    assert is_cut == (found is not None and found.verdict == Open.UNSEEABLE)
    monkeypatch.setitem(duties.REASONS, (HERE, "thing"), "read by hand")
    if found is not None and is_cut:
        (found,) = [it for it in findings.find([run]) if it.name == "thing"]
        assert (found.verdict, found.reason) == (Open.DUTY, "read by hand")


def test_objects_whose_state_is_in_c_code_are_reported_by_their_type(module: Any) -> None:
    import msgspec

    module.decoders = {"a": [msgspec.msgpack.Decoder()]}
    key = "msgspec.msgpack", "Decoder"
    run = Watch().take()
    assert key in run.unread
    only = Run([], [], {}, [], [], [("c", "Type")])
    (found,) = [it for it in findings.find([only]) if it.module == "c"]
    assert (found.kind, found.verdict) == ("extension type", Open.UNSEEABLE)


def outside(change: Callable[[], Any]) -> set[tuple[str, str]]:
    watch = Watch()
    watch.after("first", "load")
    watch.changes.clear()
    change()
    watch.after("first", "pool")
    return {(it.module, it.name) for it in watch.changes}


def test_registries_of_other_libraries_are_seen_to_change() -> None:
    import prometheus_client
    import torch
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class Made(PretrainedConfig):
        model_type = "made_up"

    made: list[Any] = []

    def change() -> None:
        made.append(prometheus_client.Counter("made_up", "made up"))
        AutoConfig.register("made_up", Made)
        made.append(torch.library.Library("made_up", "DEF"))
        made[-1].define("nothing(Tensor x) -> Tensor")

    try:
        found = outside(change)
    finally:
        prometheus_client.REGISTRY.unregister(made[0])
        CONFIG_MAPPING._extra_content.pop("made_up")
        made[1]._destroy()
    assert ("prometheus_client.registry", "REGISTRY") in found
    # The functions that have the registry for a default value have not changed.
    assert not [it for it in found if it[0] == "prometheus_client.exposition"]
    assert ("transformers.models.auto.configuration_auto", "CONFIG_MAPPING") in found
    assert ("torch.library", "_defs") in found
    assert ("torch", "operators") in found


def test_context_and_random_numbers_are_seen_to_change() -> None:
    import random

    import numpy

    variable: contextvars.ContextVar[int] = contextvars.ContextVar("made up")

    def change() -> None:
        variable.set(1)
        random.random()
        numpy.random.rand()

    found = contextvars.copy_context().run(outside, change)
    assert {("contextvars", "made up"), ("random", "getstate"), ("numpy", "rng")} <= found


def test_settings_of_c_code_are_seen_to_change() -> None:
    import torch

    mkldnn: Any = torch.backends.mkldnn

    def change() -> None:
        torch._C._set_sdp_use_flash(False)
        torch._C._set_warnAlways(True)
        mkldnn.matmul.fp32_precision = "bf16"

    try:
        found = outside(change)
    finally:
        torch._C._set_sdp_use_flash(True)
        torch._C._set_warnAlways(False)
        mkldnn.matmul.fp32_precision = "none"
    names = {name for module, name in found if module == "torch"}
    assert names >= {"flash_sdp_enabled", "warnAlways", "fp32_precision.mkldnn.matmul"}


LIBRARY = """
import itertools
import functools

table = {}
names = []
numbers = itertools.count()
setting = None

class Kind:
    flag = False

class Kept:
    def __init__(self): self.x = 0

kept = Kept()

@functools.lru_cache
def once(): return 1
"""


IN_A_LIBRARY = {
    "table": "table['a'] = 1",
    "names": "names.append(1)",
    "numbers": "next(numbers)",
    "setting": "setting = 1",
    "computed": "globals()['com' + 'puted'] = {}",
    "Kind.flag": "Kind.flag = True",
    "kept": "kept.x = 1",
    "once": "once()",
}


def test_globals_of_every_other_library_are_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = types.ModuleType("made_up_library")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(LIBRARY, vars(made))
    before = libraries.libraries()
    assert list(libraries.differences(before, libraries.libraries(before))) == []
    for name, line in IN_A_LIBRARY.items():
        exec(line, vars(made))
        after = libraries.libraries(before)
        found = libraries.differences(before, after)
        assert {key for key, *_ in found} == {(made.__name__, name)}
        before = after


def test_a_module_that_a_library_imports_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = types.ModuleType("made_up_library")
    inside: Any = types.ModuleType("made_up_library.inside")
    inside.Table = {"a": 1}
    monkeypatch.setitem(sys.modules, made.__name__, made)
    before = libraries.libraries()
    monkeypatch.setitem(sys.modules, inside.__name__, inside)
    made.inside, made.Table = inside, inside.Table
    found = list(libraries.differences(before, libraries.libraries(before)))
    assert [key for key, *_ in found if key[0] == made.__name__] == []


def test_an_object_is_read_without_running_its_code() -> None:
    class Lazy:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

    class Local(threading.local):
        def __init__(self) -> None:
            raise AssertionError

    reader = Reader()
    assert values.value_of(Lazy(), reader) != values.value_of(Lazy(), reader)
    assert values.value_of(Local.__new__(Local), reader).nodes


RESTORING = """
from contextlib import contextmanager

class Setting:
    value = [[0]]

in_a_generator, in_a_manager, in_a_clause = Setting(), Setting(), Setting()
for it in (in_a_generator, in_a_manager, in_a_clause):
    it.value = [[0]]
del it

@contextmanager
def generator(held, value):
    before = held[0][0]
    held[0][0] = value
    yield
    held[0][0] = before

class Manager:
    def __init__(self, held): self.held = held
    def __enter__(self): self.held[0][0] += 1
    def __exit__(self, *told): self.held[0][0] -= 1

def clause(held):
    held[0][0] += 1
    try:
        pass
    finally:
        held[0][0] -= 1
"""


RESTORED = {
    "in_a_generator": "with generator(in_a_generator.value, 1): pass",
    "in_a_manager": "with Manager(in_a_manager.value): pass",
    "in_a_clause": "clause(in_a_clause.value)",
}


def test_a_write_through_an_argument_is_seen_before_it_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "restoring.py"
    file.write_text(RESTORING)
    made: Any = types.ModuleType(HERE)
    monkeypatch.setitem(sys.modules, HERE, made)
    exec(compile(RESTORING, str(file), "exec"), vars(made))

    def seen(watch: Watch, line: str) -> list[str]:
        watch.changes.clear()
        with tracing(watch.trace):
            exec(line, vars(made))
            watch.after("first", "load")
        return [it.name for it in watch.changes if it.module == HERE]

    plain, watch = Watch(), Watch()
    watch.trace.before_restoring = watch.before_restoring
    for name, line in RESTORED.items():
        assert seen(plain, line) == []
        assert seen(watch, line) == [name]
        assert seen(watch, line) == []  # once for each line
