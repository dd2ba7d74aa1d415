"""Runs every architecture of the catalog alone and guarded, and writes docs/ARCHITECTURES.md.

Each step of an architecture runs in its own process with a deadline. The first step makes two
small checkpoints and computes with Hugging Face's model. Then plain SGLang computes the same,
alone. With the guard, two runners and a Llama are built and run at once from three threads, and
each is compared with itself alone, bit for bit. The last step audits two runners with the guard.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from architecture_notes import HEAD, NOTES
from architecture_outcomes import CATEGORIES, FAILED, Outcome, document, judge, versions
from architecture_steps import (
    COMPANION,
    SEEDS,
    Folders,
    alone,
    audited,
    disturbed,
    failure,
    guarded,
    in_child,
    reference,
    wait_for_one,
)
from sglang_distguard.testing import catalog
from sglang_distguard.testing.catalog import CATALOG
from tqdm import tqdm


def digest() -> str:
    """Name of everything that decides a checkpoint."""
    here = Path(catalog.__file__).parent
    sources = [file.read_bytes() for file in sorted(here.glob("*.py"))]
    sources += [(here.parent / name).read_bytes() for name in ("models.py", "readouts.py")]
    sources.append(versions().encode())
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = Folders(ROOT / ".cache" / "architectures" / digest(), ROOT / "target" / "architectures")
DOCUMENT = ROOT / "docs" / "ARCHITECTURES.md"


def references(name: str, seconds: float) -> None:
    """Run the first step of one architecture, in a process that has not imported sglang."""
    if all(FOLDERS.reference(name, seed).is_file() for seed in SEEDS):
        (FOLDERS.work / f"{name}-reference.json").write_text("{}")
        return
    in_child(FOLDERS, f"{name}-reference", seconds, lambda: reference(name, FOLDERS))


def compare(name: str, seconds: float) -> None:
    """Run the other steps of one architecture and save its outcome."""
    made = json.loads((FOLDERS.work / f"{name}-reference.json").read_text())
    results, again, together, audit = [], None, None, None
    if "failed" not in made:
        results = [one_alone(name, seed, seconds) for seed in SEEDS]
    if results and not any("failed" in result for result in results):
        if CATALOG[name].beside:
            one_alone(COMPANION, SEEDS[0], seconds, beside=name)
        again = in_child(
            FOLDERS, f"{name}-disturbed", seconds, lambda: disturbed(name, SEEDS[0], FOLDERS)
        )
        together = in_child(FOLDERS, f"{name}-guarded", seconds, lambda: guarded(name, FOLDERS))
        audit = in_child(FOLDERS, f"{name}-audited", seconds, lambda: audited(name, FOLDERS))
    outcome = judge(name, made, results, again, together, audit)
    (FOLDERS.work / f"{name}.outcome.json").write_text(json.dumps(outcome.to_json()))


def one_alone(name: str, seed: int, seconds: float, beside: str = "") -> Any:
    """Build and run one runner alone, without the guard."""
    label = f"{name}-alone-{seed}" if not beside else f"{name}-beside-{beside}"
    result = in_child(FOLDERS, label, seconds, lambda: alone(name, seed, FOLDERS, beside))
    if "forked subprocess" in result.get("failed", ""):
        return fresh(label, f"{name}:{seed}", seconds)
    return result


def fresh(label: str, member: str, seconds: float) -> Any:
    """Run one runner alone, not in a fork, where torch reports a missing GPU differently."""
    command = [sys.executable, str(Path(__file__)), "--alone", member, "--seconds", str(seconds)]
    with (FOLDERS.work / f"{label}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    return json.loads((FOLDERS.work / f"{label}.json").read_text())


def in_this_process(member: str, seconds: float) -> int:
    """Run one runner alone in this process, which ``fresh`` started."""
    name, seed = member.split(":")
    signal.alarm(int(seconds))
    prepare()
    try:
        result = alone(name, int(seed), FOLDERS)
    except BaseException as error:
        traceback.print_exc()
        result = failure(error)
    (FOLDERS.work / f"{name}-alone-{seed}.json").write_text(json.dumps(result))
    return 0


def in_parallel(title: str, names: Sequence[str], jobs: int, work: Callable[[str], None]) -> None:
    """Fork one process per name, ``jobs`` at a time."""
    children: dict[int, str] = {}
    waiting = list(names)
    with tqdm(total=len(names), desc=title, unit="arch", disable=None) as bar:
        while waiting or children:
            while waiting and len(children) < jobs:
                name = waiting.pop(0)
                children[fork(name, work)] = name
            bar.set_postfix_str(" ".join(children.values()))
            wait_for_one(children)
            bar.update()


def fork(name: str, work: Callable[[str], None]) -> int:
    """Fork a process that runs the steps of one architecture one after the other."""
    child = os.fork()
    if child != 0:
        return child
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        work(name)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
    raise AssertionError


def outcome_of(name: str) -> Outcome | None:
    """The saved outcome, or None."""
    file = FOLDERS.work / f"{name}.outcome.json"
    return Outcome(**json.loads(file.read_text())) if file.is_file() else None


def main() -> int:
    """Run what the command line asks for; return 1 if any architecture failed with the guard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these architectures (see --list)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the outcomes of a sweep that was interrupted"
    )
    parser.add_argument("--list", action="store_true", help="list the architectures and exit")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=300, help="deadline of a step (default 300)"
    )
    parser.add_argument("--alone", metavar="NAME:SEED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return in_this_process(options.alone, options.seconds)
    if options.list:
        print("\n".join(f"{entry.name}: {entry.kind}" for entry in CATALOG.values()))
        return 0
    unknown = set(options.only or ()) - set(CATALOG)
    if unknown:
        parser.error(f"unknown architecture {', '.join(sorted(unknown))}; --list lists them")
    names = [name for name in CATALOG if not options.only or name in options.only]
    if options.resume:
        names = [name for name in names if outcome_of(name) is None]
    for folder in (FOLDERS.models, FOLDERS.work):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (FOLDERS.work / f"{name}.outcome.json").unlink(missing_ok=True)
    tqdm.monitor_interval = 0  # its thread would be lost in every fork
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch  # noqa: F401
    import transformers  # noqa: F401

    in_parallel(
        "references",
        sorted({*names, COMPANION}, key=list(CATALOG).index),
        options.jobs,
        lambda name: references(name, options.seconds),
    )
    prepare()
    one_alone(COMPANION, SEEDS[0], options.seconds)
    in_parallel("sglang", names, options.jobs, lambda name: compare(name, options.seconds))
    return report(names, whole=not options.only)


def prepare() -> None:
    """Import sglang and read its text, once for all."""
    from sglang_distguard.audit.observe import source_files
    from sglang_distguard.audit.sources import source_of
    from sglang_distguard.testing.recipe import prepare_environment
    from sglang_distguard.testing.solo import import_sglang

    prepare_environment()
    import_sglang()
    for module, file in source_files().items():
        source_of(module, file)


def report(names: Sequence[str], *, whole: bool) -> int:
    """Print the outcomes of ``names``; write the document of a ``whole`` sweep."""
    outcomes = {name: found for name in CATALOG if (found := outcome_of(name)) is not None}
    for name in names:
        it = outcomes.get(name) or Outcome(name, FAILED, note="the sweep itself failed")
        error = "" if it.error is None else f" {it.error:.1e}"
        print(f"{name}: {it.category}{error} {it.note}")
    for category in CATEGORIES:
        count = sum(name in outcomes and outcomes[name].category == category for name in names)
        print(f"{count:4} {category}")
    missing = [name for name in CATALOG if name not in outcomes]
    if missing:
        print(f"{DOCUMENT.name} is not written: {len(missing)} architectures have not run")
    elif whole:
        DOCUMENT.write_text(document(outcomes, NOTES, HEAD.format(versions=versions())))
    return int(any(name not in outcomes or outcomes[name].category == FAILED for name in names))


if __name__ == "__main__":
    sys.exit(main())
