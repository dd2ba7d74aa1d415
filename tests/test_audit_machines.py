"""The audit runs on every machine, and the ledger does not depend on it."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from sglang_distguard.audit import findings, ledger, settings, values
from sglang_distguard.audit.findings import Finding, Open
from sglang_distguard.audit.graph import Reader
from sglang_distguard.audit.probes import is_probe
from sglang_distguard.audit.runs import Change, Ran, Run

LEDGER = Path(__file__).parent.parent / "ledger" / "0.5.23.csv"

TEXT = """
import functools
import os
import platform
import torch
from sglang.made_up.other import helper, reads_environment, settings
from sglang.made_up import other

_machine = platform.machine()
_rebound = None
try:
    is_tile_supported = torch.cpu._is_amx_tile_supported()
except Exception:
    is_tile_supported = False


def rebind():
    global _rebound
    _rebound = 1


@functools.lru_cache(maxsize=1)
def asks_the_processor():
    try:
        import sgl_kernel
        return hasattr(torch.ops.sgl_kernel, "convert_weight_packed") and is_tile_supported
    except Exception:
        return False


@functools.cache
def asks_helpers():
    return asks_the_processor() and helper() and _machine == "x86_64"


@functools.cache
def asks_itself(): return asks_itself_again()


def asks_itself_again(): return asks_itself()


@functools.cache
def takes_arguments(device=None): return torch.cuda.get_device_capability(device)


@functools.cache
def reads_variable(): return os.environ.get("X")


@functools.cache
def reads_variable_elsewhere(): return reads_environment()


@functools.cache
def reads_rebound(): return _rebound


@functools.cache
def reads_settings(): return settings.backend


@functools.cache
def reads_module(): return other.helper()


@functools.cache
def reads_current_device(): return torch.cuda.get_device_name(torch.cuda.current_device())


@functools.cache
def writes():
    global _rebound
    _rebound = 2
"""
OTHER = """
import os
import torch


class Settings:
    backend = "a"


settings = Settings()


def configure():
    global settings
    settings = Settings()


def helper(): return torch.version.cuda is None


def reads_environment(): return os.getenv("X")
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("asks_the_processor", True),
        ("asks_helpers", True),
        ("asks_itself", True),
        ("takes_arguments", False),
        ("reads_variable", False),
        ("reads_variable_elsewhere", False),
        ("reads_rebound", False),
        ("reads_settings", False),
        ("reads_module", False),
        ("reads_current_device", False),
        ("writes", False),
        ("not_there", False),
    ],
)
def test_a_cache_is_of_the_machine_if_it_reads_nothing_that_a_runner_changes(
    tmp_path: Path, name: str, expected: bool
) -> None:
    files = {}
    for module, text in (("sglang.made_up.m", TEXT), ("sglang.made_up.other", OTHER)):
        file = tmp_path / f"{module}.py"
        file.write_text(text)
        files[module] = str(file)
    assert is_probe("sglang.made_up.m", name, files) is expected


def run(file: Path, *, changes: list[Change], ran: list[Ran]) -> Run:
    kinds = [("sglang.made_up.m", "asks_the_processor", "cache")]
    found: dict[str, Any] = {"changes": changes, "ran": ran, "kinds": kinds}
    return Run(files={"sglang.made_up.m": str(file)}, **found)


def rows(found: list[Finding]) -> ledger.Rows:
    return {key: row for key, row in ledger.rows(found).items() if key[0] == "sglang.made_up.m"}


@pytest.mark.parametrize("phase", ["import", "load"])
def test_processors_on_which_a_probe_is_called_or_not_give_the_same_ledger(
    tmp_path: Path, phase: str
) -> None:
    file = tmp_path / "m.py"
    file.write_text(TEXT)
    asked = Change(
        "sglang.made_up.m", "asks_the_processor", phase, "alone", "0 answers", "1 answer"
    )
    with_it = findings.find([run(file, changes=[asked], ran=[])])
    without = findings.find([run(file, changes=[], ran=[])])
    assert rows(with_it) == rows(without)
    assert not [it for it in with_it if it.verdict == Open.UNCOVERED]


def test_what_import_does_on_one_machine_only_is_not_in_the_ledger(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(TEXT)
    line = 1 + TEXT.splitlines().index("    _rebound = 1")
    here = "sglang.made_up.m"
    imported = Ran(here, line, "import", "alone")
    loaded = Ran(here, line, "load", "alone")
    quiet = findings.find([run(file, changes=[], ran=[])])
    assert rows(findings.find([run(file, changes=[], ran=[imported])])) == rows(quiet)
    # Writes of a runner are in the ledger on any machine.
    later = findings.find([run(file, changes=[], ran=[loaded])])
    assert rows(later) != rows(quiet)
    verdicts = {it.name: it.verdict for it in later if it.module == here}
    assert verdicts["_rebound"] == Open.UNCOVERED


def test_the_ledger_says_nothing_of_imports() -> None:
    with LEDGER.open(newline="") as lines:
        verdicts = {row["verdict"] for row in csv.DictReader(lines)}
    assert Open.ONCE.value not in verdicts
    assert Open.UNCOVERED.value not in verdicts
    assert Open.MACHINE.value in verdicts


def test_a_configuration_of_an_older_torch_has_no_context_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11 keeps there what a user has set, of any type; 2.14 a context variable."""

    class Config(types.ModuleType):
        __module__ = "torch.utils._config_module"

    made: Any = Config("made_up_config")
    made._config = {"a": types.SimpleNamespace(user_override={})}
    monkeypatch.setitem(sys.modules, made.__name__, made)
    settings._find_homes()
    assert (made.__name__, "a") not in settings._homes.values()


def test_what_triton_compiled_for_a_kernel_is_not_read(sglang: None) -> None:
    from sglang.kernels.ops.attention.position import compute_position_kernel as kernel

    compiled: Any = kernel.device_caches
    before = values.value_of(kernel, Reader())
    compiled[7] = ({"types": "binary"}, {}, None, None, None)
    after = values.value_of(kernel, Reader())
    del compiled[7]
    assert before == after
