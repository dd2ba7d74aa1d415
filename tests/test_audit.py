"""The audit: what it sees change, what SGLang's text tells it, and that the ledger is what it finds."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sglang_distguard import treatments
from sglang_distguard.__main__ import main
from sglang_distguard.audit import findings, ledger, observe, report, runs, sources
from sglang_distguard.audit.findings import Finding, Open
from sglang_distguard.audit.runs import Change, Run, differences
from sglang_distguard.audit.traces import tracing

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "ledger" / "0.5.23.csv"

TEXT = """
import functools
from sglang.other import Shared, table

state = None
cache: dict = {}
names = []

class Kept:
    made = 0
    seen = []

    def count(self):
        Kept.made += 1
        type(self).seen.append(1)

    @classmethod
    def clear(cls):
        cls.seen = []

@functools.lru_cache
def once(): return 1

def write():
    global state
    state = 1
    cache["a"] = 2
    names.append(3)
    table["a"] = 4
    Shared.x = 5

def local():
    cache = {}
    cache["a"] = 1
    names = []
    names.append(2)
"""


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("sglang.made_up")
    other = types.ModuleType("sglang.other")
    other.Shared, other.table = type("Shared", (), {"x": 0}), {}  # type: ignore[attr-defined]
    other.Shared.__module__ = "sglang.other"  # type: ignore[attr-defined]
    sys.modules[other.__name__] = other
    sys.modules[made.__name__] = made
    exec(compile(TEXT, "made_up.py", "exec"), vars(made))
    yield made
    del sys.modules[made.__name__], sys.modules[other.__name__]


def changed(before: observe.Observation) -> set[tuple[str, str]]:
    found = differences(before, observe.observe(), phase="load", runner="first")
    return {(it.module, it.name) for it in found if it.module.startswith("sglang.")}


def test_rebinding_containers_class_attributes_and_caches_are_seen_to_change(
    module: Any,
) -> None:
    here, there = "sglang.made_up", "sglang.other"
    before = observe.observe()
    module.write()
    assert changed(before) == {
        (here, "state"),
        (here, "cache"),
        (here, "names"),
        (there, "table"),
        (here, "table"),
        (there, "Shared.x"),
    }
    before = observe.observe()
    module.Kept().count()
    module.once()
    assert changed(before) == {(here, "Kept.made"), (here, "Kept.seen"), (here, "once")}
    before = observe.observe()
    module.local()
    assert changed(before) == set()


HOLDERS = """
import functools
import itertools
import threading
import weakref
import torch

class Key:
    pass

class Slotted:
    __slots__ = ("x",)

    def __init__(self):
        self.x = 0

class Kept:
    @staticmethod
    @functools.lru_cache
    def once(): return 1

@functools.lru_cache(maxsize=1)
def last(n): return n

def function(): pass

key = Key()
last(0)
slotted = Slotted()
weak_values = weakref.WeakValueDictionary()
weak_keys = weakref.WeakKeyDictionary()
weak_set = weakref.WeakSet()
raw = bytearray(3)
local = threading.local()
number = itertools.count()
tensor = torch.zeros(3)
nested = {"a": [{}]}
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("slotted", "slotted.x = 1"),
        ("weak_values", "weak_values['a'] = key"),
        ("weak_keys", "weak_keys[key] = 1"),
        ("weak_set", "weak_set.add(key)"),
        ("raw", "raw[0] = 1"),
        ("local", "local.x = 1"),
        ("number", "next(number)"),
        ("tensor", "tensor[0] = 1"),
        ("nested", "nested['a'][0]['b'] = 1"),
        ("function", "function.calls = 1"),
        ("Kept.once", "Kept.once()"),
        ("last", "last(1)"),
        ("last", "last.cache_clear(); last(0); last(1)"),
    ],
)
def test_a_change_is_seen_whatever_holds_it(name: str, line: str) -> None:
    made: Any = types.ModuleType("sglang.made_up")
    sys.modules[made.__name__] = made
    try:
        exec(HOLDERS, vars(made))
        before = observe.observe()
        assert changed(before) == set()
        exec(line, vars(made))
        assert changed(before) == {("sglang.made_up", name)}
    finally:
        del sys.modules[made.__name__]


def test_an_equal_object_in_the_place_of_another_is_a_change(module: Any) -> None:
    before = observe.observe()
    module.cache = {}
    assert changed(before) == {("sglang.made_up", "cache")}


def test_settings_of_the_process_are_seen_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging
    import threading

    import torch

    before = observe.observe()
    default = torch.get_default_dtype()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    try:
        torch.set_default_dtype(torch.bfloat16)
        monkeypatch.setenv("DISTGUARD_SEEN", "1")
        logging.getLogger("distguard.seen").setLevel(logging.ERROR)
        thread.start()
        found = differences(before, observe.observe(), phase="load", runner="first")
    finally:
        torch.set_default_dtype(default)
        logging.getLogger("distguard.seen").setLevel(logging.NOTSET)
        stop.set()
        thread.join()
    by_name = {(it.module, it.name): it for it in found}
    assert by_name["torch", "default_dtype"].after == "'torch.bfloat16'"
    assert ("os", "environ['DISTGUARD_SEEN']") in by_name
    assert ("logging", "distguard.seen") in by_name
    assert any(module == "threading" for module, _ in by_name)


def test_what_comes_with_an_import_is_no_change(module: Any) -> None:
    before = {key: value for key, value in observe.observe().items() if key[0] != "sglang.made_up"}
    assert changed(before) == set()


def test_writes_are_found_in_the_text_and_local_names_are_not_taken_for_globals() -> None:
    found = {
        (it.module, it.name, it.function, it.rebinds)
        for it in sources.read("sglang.made_up", TEXT).writes
    }
    here, there = "sglang.made_up", "sglang.other"
    assert found == {
        (here, "state", "write", True),
        (here, "cache", "write", False),
        (here, "names", "write", False),
        (there, "table", "write", False),
        (there, "Shared.x", "write", True),
        (here, "Kept.made", "Kept.count", True),
        (here, "Kept.seen", "Kept.count", False),
        (here, "Kept.seen", "Kept.clear", True),
    }
    assert sources.read("sglang.made_up", TEXT).declared == {"state"}


WAYS = """
import os
from sglang.other import settings
from sglang.srt.environ import envs

CACHE = {}
config = object()

@dataclass
class Record:
    fields: dict = field(default_factory=dict)

    def write(self, k, v):
        self.fields[k] = v

class Kept:
    seen = {}
    own = {}

    def __init__(self):
        self.own = {}
        self.mine = {}

    def write(self, k, v):
        %s

def write(k, v):
    %s
"""


@pytest.mark.parametrize(
    ("in_method", "line", "name"),
    [
        (False, "CACHE[k][1] = v", "CACHE"),
        (False, "CACHE[k].x = v", "CACHE"),
        (False, "CACHE[k].append(v)", "CACHE"),
        (False, "CACHE.setdefault(k, []).append(v)", "CACHE"),
        (False, "CACHE.get(k).x = v", "CACHE"),
        (False, "del CACHE[k]", "CACHE"),
        (False, "CACHE[k] += v", "CACHE"),
        (False, "config.x = v", "config"),
        (False, "config.items[k] = v", "config"),
        (False, "setattr(config, 'x', v)", "config"),
        (False, "write.calls = v", "write"),
        (False, "globals()['CACHE'] = v", "CACHE"),
        (False, "Kept.seen[k] = v", "Kept.seen"),
        (True, "self.seen[k] = v", "Kept.seen"),
        (True, "self.seen.pop(k)", "Kept.seen"),
        (True, "type(self).seen = v", "Kept.seen"),
        (True, "self.__class__.seen = v", "Kept.seen"),
        (False, "envs.MADE_UP.set(v)", "envs.MADE_UP"),
        (False, "with envs.MADE_UP.override(v): pass", "envs.MADE_UP"),
        (False, "os.environ.pop('MADE_UP', None)", "environ['MADE_UP']"),
        (False, "os.environ.setdefault('MADE_UP', v)", "environ['MADE_UP']"),
        (False, "del os.environ['MADE_UP']", "environ['MADE_UP']"),
        (False, "os.environ[k.name] = v", "environ[k.name]"),
        (True, "self.own[k] = v", None),
        (True, "self.mine[k] = v", None),
        (True, "self.seen = v", None),
        (False, "k.seen = v", None),
        (False, "CACHE.get(k)", None),
        (False, "CACHE = {}", None),
    ],
)
def test_a_write_is_found_however_it_is_written(
    in_method: bool, line: str, name: str | None
) -> None:
    text = WAYS % ((line, "pass") if in_method else ("pass", line))
    found = {it.name for it in sources.read("sglang.made_up", text).writes}
    assert found == ({name} if name else set())


ELSEWHERE = """
import os
import torch.nn as nn
from contextlib import contextmanager

@contextmanager
def patched():
    before = nn.Module.extra_repr
    nn.Module.extra_repr = None
    try:
        yield
    finally:
        nn.Module.extra_repr = before

def configure(name):
    import torch._dynamo.config
    import torch.backends.cuda as cuda
    torch._dynamo.config.cache_size_limit = 8
    cuda.matmul.allow_tf32 = True
    setattr(nn, "made_up", 1)
    os.environ["MADE_UP"] = "1"
    os.environ[name] = "1"

def not_a_global(nn):
    nn.x = 1
    os = nn
    os.environ["LOCAL"] = "1"
"""


def test_writes_of_what_is_not_sglangs_are_found_in_its_text() -> None:
    found = {(it.module, it.name) for it in sources.read("sglang.made_up", ELSEWHERE).writes}
    assert found == {
        ("torch.nn", "Module.extra_repr"),
        ("torch.nn", "made_up"),
        ("torch._dynamo.config", "cache_size_limit"),
        ("torch.backends.cuda.matmul", "allow_tf32"),
        ("os", "environ['MADE_UP']"),
        ("os", "environ[name]"),
    }


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of SGLang's that writes what is not SGLang's."""
    file = tmp_path / "elsewhere.py"
    file.write_text(ELSEWHERE)
    made = types.ModuleType("sglang.elsewhere")
    made.__file__ = str(file)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(ELSEWHERE, str(file), "exec"), vars(made))
    return made


def test_what_is_written_and_put_back_is_uncovered_though_nobody_saw_it_change(
    elsewhere: Any,
) -> None:
    before = observe.observe()
    with tracing() as trace, elsewhere.patched():
        pass
    changes = differences(before, observe.observe(), phase="load", runner="first")
    assert [it for it in changes if it.module == "torch.nn"] == []
    ran = sorted(trace.ran)
    assert [module for module, _ in ran] == ["sglang.elsewhere"] * 2
    run = Run(changes, [], {"sglang.elsewhere": elsewhere.__file__}, ran)
    verdicts = {(it.module, it.name): it.verdict for it in findings.find([run])}
    assert verdicts["torch.nn", "Module.extra_repr"] == Open.UNCOVERED
    assert verdicts["torch.backends.cuda.matmul", "allow_tf32"] == Open.UNSEEN


def test_what_is_not_sglangs_and_its_text_writes_is_seen_to_change(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    before = observe.observe()
    monkeypatch.setattr(nn.Module, "extra_repr", None)
    found = differences(before, observe.observe(), phase="load", runner="first")
    assert ("torch.nn", "Module.extra_repr") in {(it.module, it.name) for it in found}


def finding(name: str, verdict: str, phase: str = "load") -> Finding:
    change = Change("sglang.m", name, phase, "first", "0", "1")
    return Finding("sglang.m", name, "container", verdict, "", (), (change,))


def test_what_changes_and_nobody_treats_is_uncovered_and_what_nobody_ran_is_not_called_safe(
    tmp_path: Path,
) -> None:
    file = tmp_path / "made_up.py"
    file.write_text(TEXT)
    row = treatments.TREATMENTS[0]
    changes = [
        Change("sglang.made_up", "cache", "load", "first", "dict of 0", "dict of 1"),
        Change("sglang.made_up", "names", "import", "alone", "list of 0", "list of 1"),
        Change(row.module, row.name, "init", "alone", "None", "x"),
    ]
    kinds = [("sglang.made_up", name, "container") for name in ("cache", "names", "fixed")]
    run = Run(changes, kinds, {"sglang.made_up": str(file)}, [])
    verdicts = {(it.module, it.name): it.verdict for it in findings.find([run])}
    here = "sglang.made_up"
    assert verdicts[here, "cache"] == Open.UNCOVERED
    assert verdicts[here, "names"] == Open.ONCE
    assert verdicts[here, "state"] == Open.UNSEEN
    assert verdicts[here, "fixed"] == Open.UNWRITTEN
    assert verdicts[row.module, row.name] == row.how.value
    told = report.text(findings.find([run]))
    assert "sglang.made_up.cache\n    UNCOVERED\n    load (first): dict of 0 -> dict of 1" in told
    assert "written at sglang.made_up:" in told
    assert "1 UNCOVERED" in told


def test_a_ledger_tells_what_is_new_gone_and_changed(tmp_path: Path) -> None:
    file = tmp_path / "0.csv"
    ledger.write(file, ledger.rows([finding("a", "scoped"), finding("b", "harmless")]))
    known = ledger.read(file)
    now = ledger.rows([finding("b", "UNCOVERED"), finding("c", "not exercised")])
    assert list(ledger.differences(known, known)) == []
    assert list(ledger.differences(known, now)) == [
        "gone: sglang.m.a",
        "changed: sglang.m.b: verdict was 'harmless', is 'UNCOVERED'",
        "new: sglang.m.c (container): not exercised",
    ]
    file.write_text("something,else\n")
    with pytest.raises(ValueError, match="is no ledger"):
        ledger.read(file)


def test_wrong_arguments_end_with_2_and_say_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "--arch", "nonsense"]) == 2
    assert main(["audit", "--model", str(tmp_path)]) == 2
    assert main(["audit", "--update"]) == 2
    assert main(["audit", "--ledger", str(tmp_path / "none.csv")]) == 2
    told = capsys.readouterr().err
    for text in ("unknown architecture 'nonsense'; known: gpt2", "has no config.json", "--ledger"):
        assert text in told


def test_a_run_that_fails_ends_with_2_and_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["audit", "--model", str(tmp_path)]) == 2
    assert "the audit's run of" in capsys.readouterr().err


def test_a_run_that_takes_too_long_is_ended_and_said_to(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"did not end within 0\.1 s"):
        runs.run(tmp_path, together=False, seconds=0.1)


def test_the_ledger_has_every_treatment_and_nothing_that_is_uncovered() -> None:
    known = ledger.read(LEDGER)
    assert [key for key, row in known.items() if row[3] == Open.UNCOVERED] == []
    for row in treatments.TREATMENTS:
        assert known[row.module, row.name][3:5] == (row.how.value, row.reason)


def test_an_audit_finds_what_the_ledger_says(tmp_path: Path) -> None:
    """The same as `make audit`, with two of its five models."""
    out = tmp_path / "audit.json"
    arguments = ["--ledger", str(LEDGER), "--json", str(out), "--cache", str(ROOT / ".cache")]
    assert main(["audit", "--arch", "llama", "--arch", "qwen3_moe", *arguments]) == 0
    assert out.is_file()
