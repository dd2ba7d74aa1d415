"""The audit: the changes it sees, the writes it reads in SGLang's text, and the ledger it gives."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import interpreters
import pytest
from audit_texts import ELSEWHERE, TEXT
from sglang_distguard.__main__ import main
from sglang_distguard.audit import (
    cases,
    findings,
    ledger,
    observe,
    processes,
    program,
    report,
    values,
)
from sglang_distguard.audit.actions import ACTIONS
from sglang_distguard.audit.cases import Case
from sglang_distguard.audit.findings import Finding, Open
from sglang_distguard.audit.runs import Change, Ran, Run, Watch, differences
from sglang_distguard.audit.serving import SERVERS
from sglang_distguard.audit.traces import tracing
from sglang_distguard.hooks import process_globals, releases
from sglang_distguard.testing import ARCHITECTURES, create_model
from sglang_distguard.testing.catalog import create

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "ledger" / "0.5.23.csv"


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


def changed(
    before: observe.Observation, after: observe.Observation | None = None
) -> set[tuple[str, str]]:
    found = differences(before, after or observe.observe(), phase="load", runner="first")
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


#: Name of a global, and a line that changes what it holds, and nothing else.
LINES = [
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
]


def test_a_change_is_seen_whatever_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = types.ModuleType("sglang.made_up")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(HOLDERS, vars(made))
    before = observe.observe()
    assert changed(before) == set()
    for name, line in LINES:
        exec(line, vars(made))
        after = observe.observe()
        assert changed(before, after) == {(made.__name__, name)}
        before = after


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


def test_globals_of_a_new_import_are_no_change_except_caches_that_were_called(module: Any) -> None:
    before = {key: value for key, value in observe.observe().items() if key[0] != "sglang.made_up"}
    assert changed(before) == set()
    module.once()
    assert changed(before) == {("sglang.made_up", "once")}


def test_a_cache_is_listed_once_also_one_of_a_partial(module: Any) -> None:
    exec("is_new = functools.lru_cache(functools.partial(local))", vars(module))
    sys.modules["sglang.other"].is_new = module.is_new  # type: ignore[attr-defined]
    listed = [key for key, thing in observe.sglang_globals() if thing is module.is_new]
    assert values.is_cache(module.is_new)
    assert listed == [("sglang.made_up", "is_new")]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of SGLang's that writes to objects outside SGLang."""
    file = tmp_path / "elsewhere.py"
    file.write_text(ELSEWHERE)
    made = types.ModuleType("sglang.elsewhere")
    made.__file__ = str(file)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(ELSEWHERE, str(file), "exec"), vars(made))
    return made


def test_a_write_that_is_undone_is_uncovered_although_no_change_was_seen(
    elsewhere: Any,
) -> None:
    watch = Watch()
    with tracing(watch.trace):
        with elsewhere.patched():
            pass
        watch.after("first", "load")
        watch.after("first", "pool")
    assert [it for it in watch.changes if it.module == "torch.nn"] == []
    text = {"sglang.elsewhere": elsewhere.__file__}
    found = findings.find([Run(watch.changes, [], text, watch.ran)])
    verdicts = {(it.module, it.name): it.verdict for it in found}
    assert verdicts["torch.nn", "made_up"] == Open.UNSEEN
    (replaced,) = [it for it in found if it.name == "Module.extra_repr"]
    lines = [write.line for write in replaced.writes]
    assert lines
    assert list(replaced.as_json()["ran"]) == [
        {"module": "sglang.elsewhere", "line": line, "phase": "load", "runner": "first"}
        for line in lines
    ]
    told = "".join(f"    ran at sglang.elsewhere:{line} in load (first)\n" for line in lines)
    assert f"torch.nn.Module.extra_repr\n    UNCOVERED\n{told}    written at" in report.text(found)


def test_changes_outside_sglang_that_its_text_can_make_are_seen(
    elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    before = observe.observe()
    monkeypatch.setattr(nn.Module, "extra_repr", None)
    found = differences(before, observe.observe(), phase="load", runner="first")
    assert ("torch.nn", "Module.extra_repr") in {(it.module, it.name) for it in found}


@pytest.mark.parametrize(
    ("phases", "verdict"),
    [
        ([], Open.UNSEEN),
        (["import"], Open.ONCE),
        (["load"], Open.UNCOVERED),
        (["import", "load"], Open.UNCOVERED),
    ],
)
def test_writes_that_ran_only_during_an_import_are_told_from_later_ones(
    elsewhere: Any, phases: list[str], verdict: Open
) -> None:
    files = {"sglang.elsewhere": elsewhere.__file__}
    (write, *_) = [
        it for it in findings.find([Run([], [], files, [])]) if it.name == "Module.extra_repr"
    ]
    ran = [Ran("sglang.elsewhere", write.writes[0].line, phase, "alone") for phase in phases]
    found = {it.name: it.verdict for it in findings.find([Run([], [], files, ran)])}
    assert found["Module.extra_repr"] == verdict


def finding(name: str, verdict: str, phase: str = "load") -> Finding:
    change = Change("sglang.m", name, phase, "first", "0", "1")
    return Finding("sglang.m", name, "container", verdict, "", (), (change,), (), verdict)


def test_an_untreated_change_is_uncovered_and_a_write_that_never_ran_is_not_called_safe(
    tmp_path: Path,
) -> None:
    file = tmp_path / "made_up.py"
    file.write_text(TEXT)
    row = process_globals.TREATMENTS[0]
    changes = [
        Change("sglang.made_up", "cache", "load", "first", "dict of 0", "dict of 1"),
        Change("sglang.made_up", "names", "import", "alone", "list of 0", "list of 1"),
        Change(row.module, row.name, "init", "alone", "None", "x"),
    ]
    kinds = [("sglang.made_up", name, "container") for name in ("cache", "names", "fixed")]
    kinds += [("sglang.made_up", "thing", "object"), ("sglang.made_up", "once", "cache")]
    run = Run(changes, kinds, {"sglang.made_up": str(file)}, [])
    verdicts = {(it.module, it.name): it.verdict for it in findings.find([run])}
    here = "sglang.made_up"
    assert verdicts[here, "cache"] == Open.UNCOVERED
    assert verdicts[here, "names"] == Open.ONCE
    assert verdicts[here, "state"] == Open.UNSEEN
    assert verdicts[here, "fixed"] == Open.UNWRITTEN
    assert verdicts[here, "thing"] == Open.UNWRITTEN
    assert verdicts[here, "once"] == Open.UNSEEN  # every call writes it
    assert verdicts[row.module, row.name] == row.how.value
    told = report.text(findings.find([run]))
    assert "sglang.made_up.cache\n    UNCOVERED\n    load (first): dict of 0 -> dict of 1" in told
    assert "written at sglang.made_up:" in told
    assert "1 UNCOVERED" in told


def test_a_ledger_tells_what_is_new_gone_and_changed(tmp_path: Path) -> None:
    file = tmp_path / "0.csv"
    ledger.write(file, ledger.rows([finding("a", "scoped"), finding("b", "unmanaged")]))
    known = ledger.read(file)
    now = ledger.rows([finding("b", "UNCOVERED"), finding("c", "not exercised")])
    assert list(ledger.differences(known, known)) == []
    assert list(ledger.differences(known, now)) == [
        "gone: sglang.m.a",
        "changed: sglang.m.b: verdict was 'unmanaged', is 'UNCOVERED'",
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
    for text in (
        "unknown architecture 'nonsense'; known: gpt2",
        "has no config.json",
        "there is no",
    ):
        assert text in told


@pytest.mark.parametrize("options", [[], ["--update"]])
def test_a_ledger_of_another_sglang_is_refused_and_what_to_do_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "9.8.7")
    assert main(["audit", "--ledger", str(LEDGER), *options]) == 2
    told = capsys.readouterr().err
    assert "is the ledger of SGLang 0.5.23, and SGLang 9.8.7 is installed" in told
    assert f"`--ledger {LEDGER.parent / '9.8.7.csv'} --update`" in told


def test_a_run_that_fails_ends_with_2_and_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["audit", "--model", str(tmp_path)]) == 2
    assert "the audit's run of" in capsys.readouterr().err


def test_an_import_that_takes_too_long_is_ended_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the audit did not end within 0\.1 s"):
        processes.run_all([Case("nothing", str(tmp_path))], seconds=0.1)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        ("threading.Event().wait()", "the audit's run of that one did not end within 0.5 s"),
        ("1 / 0", "the audit's run of that one failed (exit status 1):"),
    ],
)
def test_a_run_that_fails_or_takes_too_long_ends_the_others(
    tmp_path: Path, work: str, told: str
) -> None:
    program = f"""
import pathlib, signal, threading
from functools import partial
from sglang_distguard.audit.processes import follow, fork
folder = pathlib.Path({str(tmp_path)!r})
def another():
    signal.setitimer(signal.ITIMER_REAL, 0)
    threading.Event().wait()
works = {{"another": another, "that one": lambda: {work}}}
starts = {{name: partial(fork, work, folder / name, 0.5) for name, work in works.items()}}
follow(starts, folder, 0.5)
"""
    ran = interpreters.run(program)
    assert ran.returncode == 1
    assert told in ran.stderr


def test_the_newest_ledger_has_every_treatment() -> None:
    known = ledger.read(LEDGER)
    for row in process_globals.of_release(LEDGER.stem):
        assert known[row.module, row.name][3:5] == (row.how.value, row.reason)


@pytest.mark.parametrize("release", releases.SUPPORTED)
def test_a_ledger_says_that_nothing_is_uncovered(release: str) -> None:
    known = ledger.read(LEDGER.with_name(f"{release}.csv"))
    assert not {row[3] for row in known.values()} & {Open.UNCOVERED, Open.UNSEEABLE}


@pytest.mark.timeout(1800)  # two minutes on two idle cores, ten were seen on busy ones
def test_a_short_audit_finds_nothing_that_the_ledger_does_not_say() -> None:
    """`make audit` runs all cases, and compares the whole ledger."""

    def model_of(name: str) -> Path:
        make = create_model if name in ARCHITECTURES else create
        return make(name, ROOT / ".cache" / "models")

    found = program.audit(list(cases.short(model_of)))
    assert report.uncovered(found) == []
    ran = {(it.phase, it.runner) for finding in found for it in finding.ran}
    assert {("import", "alone"), ("load", "alone"), ("load", "first")} <= ran
    changed = {(it.phase, it.runner) for finding in found for it in finding.changes}
    assert {("weights", "first"), ("decode", "both")} <= ran | changed
    known = {key: row[3] for key, row in ledger.read(LEDGER).items()}
    verdicts = {key: row[3] for key, row in ledger.rows(found).items()}
    assert {key: it for key, it in verdicts.items() if known.get(key) != it} == {}


def test_settings_are_given_to_every_runner_as_json_or_text() -> None:
    given = ["page_size=16", "dtype=bfloat16", "enable_metrics=true", "x="]
    assert program.parsed(given) == {
        "page_size": 16,
        "dtype": "bfloat16",
        "enable_metrics": True,
        "x": "",
    }
    with pytest.raises(ValueError, match="--set takes FIELD=VALUE, not 'page_size'"):
        program.parsed(["page_size"])


def test_by_default_an_audit_runs_every_small_model_graphs_switches_and_new_weights() -> None:
    chosen = list(cases.everything(lambda name: Path(name)))
    special = {it.name for it in chosen if it.graphs or it.settings or it.server or it.items}
    plain = [it.name for it in chosen if it.generates and it.name not in special]
    assert plain == list(ARCHITECTURES)
    assert [it.name for it in chosen if not it.generates] == list(cases.POOLED)
    assert [it.items for it in chosen if it.items] == list(cases.MULTIMODAL)
    assert any(it.graphs for it in chosen)
    assert {it.server for it in chosen} == {"", *SERVERS}
    assert {name for it in chosen for name in it.actions} == set(ACTIONS)
