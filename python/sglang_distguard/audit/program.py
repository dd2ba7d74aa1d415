"""``python -m sglang_distguard audit``: runs, joins, prints, compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Optional

from tqdm import tqdm

from sglang_distguard.audit import findings, ledger, report
from sglang_distguard.audit.runs import run

#: Processes, of about 2 GiB each.
_AT_ONCE = 2


def main(
    *,
    model: Optional[Path],
    architectures: Sequence[str],
    cache: Path,
    json_file: Optional[Path],
    ledger_file: Optional[Path],
    update: bool,
) -> int:
    """Audit; returns the exit status: 1 for what is UNCOVERED or not in the ledger, 2 for failures."""
    if update and ledger_file is None:
        print("error: --update needs --ledger FILE", file=sys.stderr)
        return 2
    try:
        known = None if ledger_file is None or update else ledger.read(ledger_file)
        found = audit(_models(model, architectures, cache))
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


def _models(model: Optional[Path], architectures: Sequence[str], cache: Path) -> list[Path]:
    if model is not None:
        if not (model / "config.json").is_file():
            raise ValueError(f"{model} is no checkpoint: it has no config.json")
        return [model]
    from sglang_distguard.testing import ARCHITECTURES, create_model

    chosen = list(architectures) or list(ARCHITECTURES)
    for name in chosen:
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    return [create_model(name, cache / "models") for name in chosen]


def audit(models: Sequence[Path]) -> list[findings.Finding]:
    """Run each model alone and together, every run in a process of its own.

    Raises:
        RuntimeError: a run failed.
    """
    jobs = [(model, together) for model in models for together in (False, True)]
    with (
        ThreadPoolExecutor(_AT_ONCE) as pool,
        tqdm(total=len(jobs), desc="runs", unit="run") as bar,
    ):
        started = [pool.submit(run, model, together=together) for model, together in jobs]
        try:
            for done in as_completed(started):
                done.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    runs = [it.result() for it in started]
    files = {module for it in runs for module in it.files}
    with tqdm(total=len(files), desc="sources", unit="file") as bar:

        def advance(_module: str) -> None:
            bar.update()

        return findings.find(runs, advance)
