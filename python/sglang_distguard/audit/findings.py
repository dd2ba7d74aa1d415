"""Joins observed changes with the writers in SGLang's text and with the guard's treatments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sglang_distguard.audit import duties, paths
from sglang_distguard.audit.observe import Key
from sglang_distguard.audit.probes import is_probe
from sglang_distguard.audit.runs import PHASES, Change, Ran, Run
from sglang_distguard.audit.sources import Write, source_of
from sglang_distguard.hooks import process_globals
from sglang_distguard.hooks.releases import installed_version


class Open(StrEnum):
    """The verdict on a global that has no row in ``hooks.process_globals``."""

    UNCOVERED = "UNCOVERED"  # it changed, or a line that writes it ran
    ONCE = "import"  # as UNCOVERED, but only while SGLang was imported
    UNSEEN = "not exercised"  # functions write it, but none of those that ran did
    UNWRITTEN = "no writer found"  # it did not change, and no line that writes it is known
    MACHINE = "machine"  # a cache that can hold only a property of machine and installation
    DUTY = "reader's duty"  # no program can see its changes; ``duties`` says who reads what
    UNSEEABLE = "UNSEEABLE"  # as before, and ``duties`` says nothing about it
    TEXT = "text only"  # a path that no CPU runs


@dataclass(frozen=True)
class Finding:
    """One process-global.

    Attributes:
        module: where it is.
        name: of the global; "Class.attribute" for a class's.
        kind: "global statement", "container", "cache", "object", "closure", "written", "process",
            "extension type" (of objects whose state no Python code can read), "library" (all
            globals of one, without those that have a line of their own) or "path" (code that no
            CPU runs; see ``paths``).
        verdict: the treatment, or one of ``Open``.
        reason: of the treatment; empty without one.
        writes: where SGLang writes it, as far as its text shows.
        changes: when it was seen to change.
        ran: which of ``writes`` ran, and when.
        lasting: the verdict without what happened while SGLang was imported. At that time there is
            no configuration, so only machine and installation decide what happens.
    """

    module: str
    name: str
    kind: str
    verdict: str
    reason: str
    writes: tuple[Write, ...]
    changes: tuple[Change, ...]
    ran: tuple[Ran, ...]
    lasting: str

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return asdict(self)


def find(
    runs: Sequence[Run], advance: Callable[[str], None] = lambda module: None
) -> list[Finding]:
    """Find every process-global of the SGLang modules that the runs imported.

    Treated globals, and all others that changed, are included.

    Args:
        runs: observations of the processes.
        advance: called with the name of each module whose text was read.
    """
    files = {module: file for run in runs for module, file in run.files.items()}
    kinds = {(module, name): kind for run in runs for module, name, kind in run.kinds}
    writes: dict[Key, list[Write]] = {}
    for module, file in sorted(files.items()):
        source = source_of(module, file)
        for write in source.writes:
            writes.setdefault(_key(write, files), []).append(write)
        for name in source.declared:
            kinds[module, name] = "global statement"
        advance(module)
    for key in writes:
        kinds.setdefault(key, _kind_of_other(key[0]))
    seen: dict[Key, list[Change]] = {}
    for run in runs:
        for change in run.changes:
            seen.setdefault(_listed(change, writes), []).append(change)
    libraries = {(package, "*") for package in duties.LIBRARIES}
    kinds |= dict.fromkeys(libraries, "library")
    unread = {key for run in runs for key in run.unread}
    kinds |= dict.fromkeys(unread, "extension type")
    cut = {key for run in runs for key in run.cut}
    # Every treatment gets a line, even if these runs did not reach its global, in every release
    # that has the global.
    rows = process_globals.of_release(installed_version())
    treated = {(row.module, row.name) for row in rows}
    for module, name in seen.keys() | treated | cut:
        kinds.setdefault((module, name), _kind_of_other(module))
    ran: dict[tuple[str, int], set[Ran]] = {}
    for run in runs:
        for it in run.ran:
            ran.setdefault((it.module, it.line), set()).add(it)
    found = [
        _finding(
            key,
            kinds[key],
            tuple(writes.get(key, ())),
            tuple(dict.fromkeys(seen.get(key, ()))),
            _ran(writes.get(key, ()), ran),
            is_probe=kinds[key] in _ASKED and is_probe(*key, files),
            is_hidden=key in unread or key in cut or key in libraries,
        )
        for key in sorted(kinds)
    ]
    return [*map(_unrun, paths.UNRUN.items()), *found]


def _unrun(path: tuple[str, str]) -> Finding:
    name, why = path
    text = Open.TEXT.value
    return Finding(paths.MODULE, name, "path", text, why, (), (), (), text)


def _listed(change: Change, writes: Mapping[Key, object]) -> Key:
    """The key of the line that has the change: its own, or that of a whole library."""
    key = change.module, change.name
    library = duties.library_of(change.module)
    if library is None or key in writes or process_globals.find(*key) is not None:
        return key
    return library, "*"


def _ran(writes: Iterable[Write], ran: Mapping[tuple[str, int], set[Ran]]) -> tuple[Ran, ...]:
    places = {(write.file, write.line) for write in writes}
    found = (it for place in places for it in ran.get(place, ()))
    return tuple(sorted(found, key=lambda it: (it.module, it.line, _when(it))))


def _when(it: Ran) -> tuple[int, str]:
    return PHASES.index(it.phase), it.runner


def _key(write: Write, files: Mapping[str, str]) -> Key:
    """Key of a write: ``config`` of ``a`` instead of ``x`` of a missing module ``a.config``."""
    package, _, last = write.module.rpartition(".")
    if write.module in files or package not in files:
        return write.module, write.name
    file = Path(files[package])
    inside = file.parent / last
    if file.name == "__init__.py" and (inside.is_dir() or Path(f"{inside}.py").exists()):
        return write.module, write.name  # the module exists, but was not imported
    return package, last


def _kind_of_other(module: str) -> str:
    return "written" if module.startswith("sglang.") else "process"


def _finding(
    key: Key,
    kind: str,
    writes: tuple[Write, ...],
    changes: tuple[Change, ...],
    ran: tuple[Ran, ...],
    *,
    is_probe: bool,
    is_hidden: bool,
) -> Finding:
    row = process_globals.find(*key)
    phases = {it.phase for it in (*changes, *ran)}
    if row is not None:
        verdict, lasting, reason = row.how.value, row.how.value, row.reason
    elif is_probe:
        verdict, lasting, reason = Open.MACHINE.value, Open.MACHINE.value, ""
    elif is_hidden:
        reason = duties.REASONS.get(key, "")
        verdict = lasting = (Open.DUTY if reason else Open.UNSEEABLE).value
    else:
        verdict, reason = _open(kind, writes, phases).value, ""
        lasting = _open(kind, writes, phases - {"import"}).value
    return Finding(*key, kind, verdict, reason, writes, changes, ran, lasting)


def _open(kind: str, writes: tuple[Write, ...], phases: Set[str]) -> Open:
    """The verdict on a global that changed, or whose writers ran, in these phases.

    A value that is restored within a phase looks unchanged, but another thread saw it in between.
    """
    if phases - {"import"}:
        return Open.UNCOVERED
    if phases:
        return Open.ONCE
    return Open.UNSEEN if writes or kind in _ASKED else Open.UNWRITTEN


#: Kinds that a call writes.
_ASKED = ("cache", "closure")
