"""The ledger of one SGLang version: a file in the repository with one line per process-global.

The verdicts of treated globals come from ``hooks.process_globals``. The file keeps them beside all
others, so that a new SGLang version, or a run that reaches more code, shows as a difference. What
depends on the machine is left out. One part is what happened while SGLang was imported, before
there was any configuration. The other is which caches were asked that can hold only a property of
the machine and the installation.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from sglang_distguard.audit.findings import Finding

COLUMNS = ("module", "name", "kind", "verdict", "reason", "written by")

Row = tuple[str, ...]
Rows = dict[tuple[str, str], Row]


def rows(findings: Sequence[Finding]) -> Rows:
    """The ledger lines of ``findings``, by module and name.

    They have no line numbers, because every release changes those.
    """
    return {(finding.module, finding.name): _row(finding) for finding in findings}


def _row(finding: Finding) -> Row:
    writers = sorted({f"{write.file}:{write.function}" for write in finding.writes})
    return (
        finding.module,
        finding.name,
        finding.kind,
        finding.lasting,
        finding.reason,
        " ".join(writers),
    )


def read(file: Path) -> Rows:
    """Read the lines of a ledger.

    Raises:
        OSError: there is no such file.
        ValueError: the file is no ledger.
    """
    with file.open(newline="", encoding="utf-8") as lines:
        header, *found = csv.reader(lines)
    if tuple(header) != COLUMNS:
        raise ValueError(f"{file} is no ledger: its columns are {header}, not {list(COLUMNS)}")
    return {(row[0], row[1]): tuple(row) for row in found}


def write(file: Path, found: Rows) -> None:
    """Write ``found`` to ``file`` as the ledger."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(found[key] for key in sorted(found))


def differences(known: Rows, found: Rows) -> Iterator[str]:
    """Describe which globals are new, gone or changed, one line each."""
    for key in sorted(known.keys() | found.keys()):
        name = ".".join(key)
        was, now = known.get(key), found.get(key)
        if was is None:
            assert now is not None
            yield f"new: {name} ({now[2]}): {now[3]}{_by(now)}"
        elif now is None:
            yield f"gone: {name}"
        elif was != now:
            fields = [
                f"{column} was {before!r}, is {after!r}"
                for column, before, after in zip(COLUMNS, was, now, strict=True)
                if before != after
            ]
            yield f"changed: {name}: {'; '.join(fields)}"


def _by(row: Row) -> str:
    return f", written by {row[5]}" if row[5] else ""
