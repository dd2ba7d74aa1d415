"""Two runners of one checkpoint that share weights, every architecture; writes docs/SHARED_WEIGHTS.md.

For each architecture that builds and runs on a CPU: a runner computes; a second one is built that
shares its weights; then both compute at once, three times. Every result must have the bits of the
first one, and no parameter may have changed. Sharing that is refused is told with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from architecture_outcomes import versions
from architecture_steps import Folders, at_once, compute, in_child
from architectures import digest, in_parallel, prepare
from sglang_distguard.testing import steps
from sglang_distguard.testing.catalog import CATALOG, create
from sglang_distguard.testing.reference import bit_equal
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = Folders(ROOT / ".cache" / "architectures" / digest(), ROOT / "target" / "shared-weights")
DOCUMENT = ROOT / "docs" / "SHARED_WEIGHTS.md"
ROUNDS = 3
SAME, REFUSED, WRONG, CANNOT = "bit-equal", "refused", "WRONG", "does not run alone"
HEAD = """# Runners that share weights

`make shared-weights` builds two runners of one checkpoint for every architecture of the catalog
([ARCHITECTURES.md](ARCHITECTURES.md)) on a CPU, the second with `share_weights_with=` the first, and writes this file. {versions}.

"{same}": the first one's bits before the second was built are those of both, computing at once, three times, and no parameter has
changed. "own" is the part of a runner's weights, in per cent, that it does not share: buffers, and tensors that are no parameters.

{summary}

| architecture | outcome | own % | note |
|---|---|---|---|
"""


def build(name: str, folder: Path) -> Any:
    from sglang_distguard.testing.recipe import server_args

    settings: dict[str, Any] = {"dtype": "float32", **CATALOG[name].overrides}
    return steps.build(server_args(folder, **settings))


def digests(runner: Any) -> dict[str, str]:
    """The content of each parameter."""
    import torch

    return {
        name: hashlib.sha256(
            it.detach().contiguous().view(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for name, it in runner.model.named_parameters()
    }


def shared(name: str, folder: Path) -> dict[str, Any]:
    """What came of sharing the weights of one architecture."""
    import sglang_distguard as dg
    from sglang_distguard.runner.weights import sharing_with

    entry = CATALOG[name]
    dg.install()
    try:
        source = build(name, folder)
        expected = compute(entry, source, None, activate=dg.activate)
        again = compute(entry, source, None, activate=dg.activate)
    except Exception as error:
        return {"outcome": CANNOT, "note": f"{type(error).__name__}: {error}"[:200]}
    if not bit_equal(expected, again):
        return {"outcome": CANNOT, "note": "the bits of a runner alone differ between two runs"}
    before = digests(source)
    try:
        with sharing_with(source):
            replica = build(name, folder)
    except (dg.SpecMismatch, dg.NotSupported) as error:
        return {"outcome": REFUSED, "note": str(error)[:300]}
    runners = {"source": source, "replica": replica}
    problems: list[str] = []

    def computes(key: str, meet: threading.Barrier) -> None:
        meet.wait()
        for _ in range(ROUNDS):
            found = compute(entry, runners[key], None, activate=dg.activate)
            if not bit_equal(found, expected):
                problems.append(f"{key} has other bits")

    problems += at_once(list(runners), computes)
    if digests(source) != before or digests(replica) != before:
        problems.append("a forward has changed parameters")
    memory = dg.memory(replica)
    if not memory.shared or dg.memory(source).shared != memory.shared:
        problems.append(f"nothing is shared, or not the same: {memory}")
    own = 100 * memory.weights / (memory.weights + memory.shared)
    for runner in runners.values():
        dg.close(runner)
    return {"outcome": WRONG if problems else SAME, "own": own, "note": "; ".join(set(problems))}


def one(name: str, seconds: float) -> None:
    """Run one architecture; save its row."""
    folder = in_child(
        FOLDERS, f"{name}-checkpoint", seconds, lambda: str(create(name, FOLDERS.models, seed=0))
    )
    if isinstance(folder, dict):
        row = {"outcome": CANNOT, "note": f"no checkpoint: {folder['failed']}"}
    else:
        row = in_child(FOLDERS, f"{name}-shared", seconds, lambda: shared(name, Path(folder)))
        if "failed" in row:
            row = {"outcome": WRONG, "note": f"{row['failed']} ({row['where']})"}
    _file(name).write_text(json.dumps(row))


def _file(name: str) -> Path:
    return FOLDERS.work / f"{name}.row.json"


def _row(name: str) -> Mapping[str, Any]:
    if not _file(name).is_file():
        return {"outcome": WRONG, "note": "the run itself failed"}
    row: Mapping[str, Any] = json.loads(_file(name).read_text())
    return row


def main() -> int:
    """Run what the command line asks for; return 1 if any architecture is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CATALOG))
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--seconds", type=float, default=300, help="deadline of a step")
    options = parser.parse_args()
    names = [name for name in CATALOG if not options.only or name in options.only]
    for folder in (FOLDERS.models, FOLDERS.work):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _file(name).unlink(missing_ok=True)
    tqdm.monitor_interval = 0  # its thread would be lost in every fork
    prepare()
    in_parallel("sharing", names, options.jobs, lambda name: one(name, options.seconds))
    rows = {name: _row(name) for name in names}
    counts = {
        outcome: sum(row["outcome"] == outcome for row in rows.values())
        for outcome in (SAME, REFUSED, WRONG, CANNOT)
    }
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    lines = [
        f"| {name} | {row['outcome']} | {row['own']:.1f} | {row['note']} |"
        if "own" in row
        else f"| {name} | {row['outcome']} | | {' '.join(row['note'].split()).replace('|', '/')} |"
        for name, row in rows.items()
        if row["outcome"] != CANNOT
    ]
    print("\n".join(lines), summary, sep="\n")
    if not options.only:
        head = HEAD.format(versions=versions(), same=SAME, summary=f"**{summary}.**")
        DOCUMENT.write_text(head + "\n".join(lines) + "\n")
    return 1 if counts[WRONG] else 0


if __name__ == "__main__":
    sys.exit(main())
