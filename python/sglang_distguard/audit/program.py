"""``python -m sglang_distguard audit``: runs cases, prints findings, compares the ledger."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from sglang_distguard.audit import cases, findings, ledger, report
from sglang_distguard.audit.cases import Case
from sglang_distguard.audit.processes import run_all


def main(
    *,
    model: Optional[Path],
    architectures: Sequence[str],
    settings: Sequence[str],
    cache: Path,
    json_file: Optional[Path],
    ledger_file: Optional[Path],
    update: bool,
) -> int:
    """Audit; return 1 for UNCOVERED globals or ledger differences, 2 for failures, else 0."""
    if update and ledger_file is None:
        print("error: --update needs --ledger FILE", file=sys.stderr)
        return 2
    try:
        _check_ledger(ledger_file, update=update)
        known = None if ledger_file is None or update else ledger.read(ledger_file)
        found = audit(_cases(model, architectures, parsed(settings), cache))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sglang {metadata.version('sglang')}, torch {metadata.version('torch')}\n")
    print(report.text(found))
    if json_file is not None:
        json_file.write_text(json.dumps([it.as_json() for it in found], indent=1) + "\n")
    is_open = bool(report.uncovered(found))
    if ledger_file is None:
        return int(is_open)
    if known is None:
        ledger.write(ledger_file, ledger.rows(found))
        return int(is_open)
    differences = list(ledger.differences(known, ledger.rows(found)))
    for line in differences:
        print(line)
    print(f"{len(differences)} differences from {ledger_file}.")
    return int(is_open or bool(differences))


def _check_ledger(ledger_file: Optional[Path], *, update: bool) -> None:
    """Check that the ledger exists and, if its name is a version, that this SGLang is installed."""
    if ledger_file is None:
        return
    installed = metadata.version("sglang")
    if re.match(r"\d+\.\d+", ledger_file.stem) and ledger_file.stem != installed:
        raise ValueError(
            f"{ledger_file} is the ledger of SGLang {ledger_file.stem}, and SGLang {installed} is "
            f"installed; `--ledger {ledger_file.with_name(f'{installed}.csv')} --update` writes a "
            "ledger for it, `make compat SGLANG=sglang==VERSION` audits another release"
        )
    if not update and not ledger_file.is_file():
        raise ValueError(
            f"there is no ledger {ledger_file}; `--ledger {ledger_file} --update` writes it"
        )


def parsed(settings: Sequence[str]) -> dict[str, Any]:
    """Parse texts FIELD=VALUE into field -> value, as JSON where possible."""
    found = {}
    for text in settings:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise ValueError(f"--set takes FIELD=VALUE, not {text!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _cases(
    model: Optional[Path], architectures: Sequence[str], settings: dict[str, Any], cache: Path
) -> list[Case]:
    if model is not None:
        if not (model / "config.json").is_file():
            raise ValueError(f"{model} is no checkpoint: it has no config.json")
        return [Case(model.name, str(model), settings)]
    from sglang_distguard.testing import ARCHITECTURES, create_model
    from sglang_distguard.testing.catalog import create

    def model_of(name: str) -> Path:
        make = create_model if name in ARCHITECTURES else create
        return make(name, cache / "models")

    for name in architectures:
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    if architectures or settings:
        chosen = list(architectures) or list(ARCHITECTURES)
        return [Case(name, str(model_of(name)), settings) for name in chosen]
    return list(cases.everything(model_of))


def audit(given: Sequence[Case]) -> list[findings.Finding]:
    """Import SGLang, run each case alone and together, every run in a process of its own.

    Raises:
        RuntimeError: a run failed.
    """
    with tqdm(total=sum(len(it.runs) for it in given), desc="runs", unit="run") as bar:
        runs = run_all(given, done=bar.update)
    files = {module for it in runs for module in it.files}
    with tqdm(total=len(files), desc="sources", unit="file") as bar:

        def advance(_module: str) -> None:
            bar.update()

        return findings.find(runs, advance)
