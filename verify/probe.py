"""What a release of SGLang has for the guard, from its wheel alone: nothing of it is installed.

.venv/bin/python verify/probe.py sglang==0.5.23
.venv/bin/python verify/probe.py --newest 3

torch and Python are those of this environment, not those that the release asks for.

Exit status: 1 if the guard would refuse a release, or a row or hook has lost what it is about; 2 if
a release cannot be downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

# Set before anything reads it: the text of an unpacked wheel is looked at once.
os.environ["SGLANG_DISTGUARD_CACHE"] = "0"

from packaging.version import Version
from sglang_distguard.audit.sources import uncollected
from sglang_distguard.hooks import generation_0_5_21, process_globals, releases, versions
from sglang_distguard.hooks.versions import Plan
from sglang_distguard.patching import find_source, outline
from sglang_distguard.patching.source import files_below

LEDGERS = Path(__file__).resolve().parent.parent / "ledger"
#: Packages whose modules runners import.
PACKAGES = ("sglang.srt", "sglang.kernels")


def main(arguments: Sequence[str]) -> int:
    """Probe the releases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("requirement", nargs="?", help="such as sglang==0.5.23")
    which.add_argument("--newest", type=int, metavar="N", help="the N newest of the package index")
    chosen = parser.parse_args(arguments)
    if chosen.newest is None:
        wanted = [chosen.requirement]
    else:
        try:
            wanted = [f"sglang=={release}" for release in newest(chosen.newest)]
        except subprocess.CalledProcessError as error:
            print(f"probe: SKIPPED, no package index answers: {_last_line(error.stderr)}")
            return 0
    results = []
    for requirement in wanted:
        try:
            results.append(probe(requirement))
        except subprocess.CalledProcessError as error:
            print(f"error: {requirement}: {_last_line(error.stderr)}", file=sys.stderr)
            results.append(2)
    return max(results, default=2)  # pip lists none


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["pip says nothing"])[-1]


def newest(count: int) -> list[str]:
    """The newest releases that the configured package index has, newest first."""
    listed = _pip("index", "versions", "sglang")
    found = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
    return found[1].split(", ")[:count] if found else []


def _pip(*arguments: str) -> str:
    quietly = ("--disable-pip-version-check", "--no-input", "--retries", "1")
    command = [sys.executable, "-m", "pip", *arguments, *quietly]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


def probe(requirement: str) -> int:
    """Download the wheel of one release, and print what it has for the guard."""
    with tempfile.TemporaryDirectory(prefix="distguard-probe-") as scratch, uncollected():
        folder, release = unpacked(requirement, Path(scratch) / "probed")
        plan = versions.plan_of(generation_0_5_21.changes(), release, folder)
        found = [*findings(plan, folder)]
        print(f"sglang {release}: {len(plan.modules)} modules would be changed")
        for kind, text in [*found, *new_globals(release, folder, Path(scratch) / "base")]:
            print(f"  {kind}: {text}")
    told = {kind for kind, _ in found}
    return int(bool(told & {"missing", "refused", "lost", "wrong"}))


def unpacked(requirement: str, folder: Path) -> tuple[Path, str]:
    """Unpack the text of SGLang in its wheel; return the folder and the version."""
    _pip("download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder), requirement)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        texts = [name for name in archive.namelist() if name.startswith("sglang/")]
        archive.extractall(folder, [name for name in texts if name.endswith(".py")])
    return folder, wheel.name.split("-")[1]


def findings(plan: Plan, at: Path) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) of everything about the plan that a reader must know.

    Kinds: "missing" (required), "refused" (in a form that cannot be changed), "lost" (an earlier
    release had it), "dropped" (this release does not have it, as ``releases`` says), "wrong"
    (``releases`` says that it does not have it, and it does), "row about nothing" (of a global
    that needs no hook, and that an earlier release had).
    """
    for it in plan.missing:
        yield "missing", f"{it.module}.{it.qualname} ({it.why}){_moved(it.module, it.qualname, at)}"
    for reason in plan.refused:
        yield "refused", reason
    required = {(it.module, it.qualname) for it in plan.missing}
    for it in sorted(plan.absent):
        if (it.module, it.name) in required:
            continue
        kind = "lost" if it in plan.lost else "dropped"
        yield kind, f"{it.module}.{it.name}{_moved(it.module, it.name, at)}"
    for row in process_globals.of_release(plan.release):
        key = row.module, row.name
        is_sglangs = row.module.startswith("sglang.") and "*" not in row.name
        if is_sglangs and key not in {(it.module, it.name) for it in plan.absent}:
            source = find_source(row.module, at)
            found = None if source is None else outline(source)
            names = found.bound | found.imported if found is not None else ()
            is_open = found is not None and found.is_open  # by `from … import *`
            if not is_open and row.name.partition(".")[0] not in names:
                yield "row about nothing", f"{row.module}.{row.name}{_moved(*key, at)}"
    for module, name in releases.limited():
        if not module.startswith("sglang."):
            continue  # not in the wheel: read there, it would be that of this environment
        source = find_source(module, at)
        is_there = source is not None and name in outline(source).bound
        if is_there and not releases.has(plan.release, module, name):
            span = releases.span_of(module, name)
            yield "wrong", f"{module}.{name} is here; hooks/releases.py says: {span}"


def _moved(module: str, name: str, at: Path) -> str:
    """Where else the wheel defines ``name`` at the level of a module."""
    own = find_source(module, at)
    first = name.partition(".")[0]
    if own is not None and first in outline(own).bound:
        return ""
    defined = re.compile(
        rf"^(?:{re.escape(first)}\s*[:=]|(?:async\s+)?(?:def|class)\s+{re.escape(first)}\b)", re.M
    )
    places = [
        file.module
        for package in PACKAGES
        for file in files_below(package, at)
        if file.module != module and defined.search(file.read().text)
    ]
    return f"; moved to {' or '.join(places)}" if places else ""


def new_globals(release: str, at: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """Yield the ``global`` statements that the newest ledger up to ``release`` cannot have."""
    known = [it.stem for it in LEDGERS.glob("*.csv") if Version(it.stem) <= Version(release)]
    base = max(known, key=Version, default=None)
    if base is None:
        yield "new globals", "not compared: every ledger is newer"
        return
    if base == release:
        yield "new globals", f"none: ledger/{base}.csv is about this release"
        return
    before = (
        None if releases.installed_version() == base else unpacked(f"sglang=={base}", scratch)[0]
    )
    added = sorted(_declared(at) - _declared(before))
    yield "new globals", f"{len(added)} since {base}{': ' if added else ''}{', '.join(added)}"


def _declared(at: Optional[Path]) -> set[str]:
    """Every global that a ``global`` statement names; in this environment if ``at`` is None."""
    found = set()
    for package in PACKAGES:
        for file in files_below(package, at):
            source = file.read()
            if "global " in source.text:
                found |= {f"{file.module}.{name}" for name in outline(source).declared}
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
