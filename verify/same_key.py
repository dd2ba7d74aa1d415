"""Runs runners that agree in every key and differ in content, and writes docs/SAME_KEY.md.

A memory of SGLang, transformers or torch that is keyed by path, name, shapes or requests gives the
second of two such runners what it computed for the first. For each architecture:

- Files: three checkpoints lie at one path, one after the other: the second has other weights, the third
  the first one's weights and another ``config.json`` (norm epsilons and the like, no shape). Each
  runner is built while the ones before it live; all then compute at once.
- Configuration: two runners of one path and the same files differ in what
  ``json_model_override_args`` changes (no shape). They are built and compute at once.
- Reopened: all are closed, the first checkpoint's files are put back at the path, and another runner
  is built there.

Requests, request ids, prompts and the runners' settings are the same. Each runner is compared, bit for
bit, with the same runner in a process of its own without the guard.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from architecture_outcomes import versions
from architecture_steps import (
    SEEDS,
    Folders,
    at_once,
    compute,
    disturb,
    in_child,
    require_plain_sglang,
)
from architectures import digest, in_parallel, prepare
from sglang_distguard.testing import steps
from sglang_distguard.testing.catalog import CATALOG, create
from sglang_distguard.testing.reference import bit_equal, max_abs_error
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = Folders(ROOT / ".cache" / "architectures" / digest(), ROOT / "target" / "same-key")
DOCUMENT = ROOT / "docs" / "SAME_KEY.md"
ROUNDS = 3

#: Fields of a configuration that change no shape -> factor for the second runner.
FACTORS: Mapping[str, float] = {
    "rms_norm_eps": 1e4,
    "norm_eps": 1e4,
    "norm_epsilon": 1e4,
    "layer_norm_eps": 1e4,
    "layer_norm_epsilon": 1e4,
    "layernorm_epsilon": 1e4,
    "rope_theta": 0.01,
    "logits_scaling": 2.0,
    "logit_scale": 2.0,
}

#: Case, a column of the table -> the content of its second runner.
CASES: Mapping[str, str] = {
    "weights": "second",
    "config.json": "edited",
    "override": "override",
    "reopened": "first",
}
SAME, OTHER = "bit-equal", "OTHER BITS"
UNTOLD, UNDEFINED = "the same alone", "undefined alone"
HEAD = """# Same key, other content

Runners of one process that agree in everything that a memory could be keyed by (path, file names, shapes,
settings, prompts, request ids) and differ in content. `make same-key` runs them for every architecture
that runs alone on a CPU ([ARCHITECTURES.md](ARCHITECTURES.md)) and writes this file. {versions}.

- **Weights**: two checkpoints with one configuration at one path, the second put there while a runner of
  the first lives.
- **config.json**: a third checkpoint at that path, with the first one's weights and another `config.json`
  (norm epsilons, rope base, scales; no shape). Then all three compute at once, three times.
- **Override**: one path and the same files, built at once from two threads; the second has these other
  values in `json_model_override_args`.
- **Reopened**: all runners closed, the first checkpoint put back at the path, another runner built.

"{same}" means that every runner has the bits that it has in a process of its own without the guard.
"{untold}" means that both contents give the same bits alone, so that nothing could be mixed up.
"{undefined}" means that the bits of a runner alone depend on uninitialised memory or random numbers
([ARCHITECTURES.md](ARCHITECTURES.md) says which).

| architecture | weights | config.json | override | reopened | note |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Content:
    """What one runner is made of.

    Attributes:
        checkpoint: its files.
        edited: what its ``config.json`` has instead.
        override: its ``json_model_override_args``.
    """

    checkpoint: Path
    edited: Mapping[str, Any] = field(default_factory=dict)
    override: Mapping[str, Any] = field(default_factory=dict)


class Place:
    """The path at which one checkpoint lies at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model"

    def put(self, content: Content) -> Path:
        """Replace the files at the path by copies of those of ``content``."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(content.checkpoint, self.path)
        if content.edited:
            file = self.path / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **content.edited}))
        return self.path


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with the second runner's values."""
    found = {name: config[name] * factor for name, factor in FACTORS.items() if config.get(name)}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_theta"):
        theta = rope["rope_theta"] * FACTORS["rope_theta"]
        found["rope_parameters"] = {**rope, "rope_theta": theta}
    return found


def build(name: str, content: Content, place: Place, *, is_there: bool = False) -> Any:
    """A runner of ``content`` at ``place``, by SGLang's own steps."""
    from sglang_distguard.testing.recipe import server_args

    path = place.path if is_there else place.put(content)
    settings: dict[str, Any] = {"dtype": "float32", **CATALOG[name].overrides}
    if content.override:
        settings["json_model_override_args"] = json.dumps(content.override)
    return steps.build(server_args(path, **settings))


def alone(name: str, content: Content, file: Path) -> dict[str, Any]:
    """Build and run one runner without the guard; save its bits in ``file``."""
    import torch

    require_plain_sglang()
    runner = build(name, content, Place(file.with_suffix("")))
    torch.save(compute(CATALOG[name], runner, None), file)
    return {}


def disturbed(name: str, content: Content, file: Path) -> dict[str, Any]:
    """Whether a runner has its bits alone again, with other uninitialised memory and random numbers.

    SGLang leaves weights as it made them that the checkpoint does not have.
    """
    import torch

    disturb()
    again = file.with_suffix(".again.pt")
    alone(name, content, again)
    before, after = (torch.load(it, weights_only=True) for it in (file, again))
    return {"same": bit_equal(before, after)}


class Guarded:
    """The runners of one architecture in this process, with the guard.

    Attributes:
        problems: case -> what was wrong.
    """

    def __init__(
        self,
        name: str,
        contents: Mapping[str, Content],
        alone: Mapping[str, torch.Tensor],
        place: Place,
    ) -> None:
        self._name = name
        self._contents = contents
        self._alone = alone
        self._place = place
        self.problems: dict[str, list[str]] = {case: [] for case in CASES}

    def check(self, case: str, key: str, runner: Any) -> None:
        """Note where the runner has other bits than alone."""
        import sglang_distguard

        found = compute(CATALOG[self._name], runner, None, activate=sglang_distguard.activate)
        if not bit_equal(found, self._alone[key]):
            off = max_abs_error(found, self._alone[key])
            nearest = [it for it in self._alone if bit_equal(found, self._alone[it])]
            told = f"has those of {nearest[0]}" if nearest else f"differs by {off:.3g}"
            self.problems[case].append(f"{key} {told}")

    def files(self) -> None:
        """Each content at the place after the one before it; then all at once."""
        runners = {}
        case_of = {"first": "weights", "second": "weights", "edited": "config.json"}
        for key in [key for key in case_of if key in self._contents]:
            runners[key] = build(self._name, self._contents[key], self._place)
            self.check(case_of[key], key, runners[key])

        def computes(key: str, meet: threading.Barrier) -> None:
            meet.wait()
            for _ in range(ROUNDS):
                self.check(case_of[key], key, runners[key])

        self.problems["weights"] += at_once(list(runners), computes)
        self._close(list(runners.values()))

    def override(self) -> None:
        """The same files, two configurations, built at once and then computing at once."""
        self._place.put(self._contents["first"])
        runners: list[Any] = []

        def builds(key: str, meet: threading.Barrier) -> None:
            meet.wait()
            runner = build(self._name, self._contents[key], self._place, is_there=True)
            runners.append(runner)
            meet.wait()
            for _ in range(ROUNDS):
                self.check("override", key, runner)

        self.problems["override"] += at_once(["first", "override"], builds)
        self._close(runners)

    def reopened(self) -> None:
        """Another runner of the first files, after all others were closed."""
        runner = build(self._name, self._contents["first"], self._place)
        self.check("reopened", "first", runner)
        self._close([runner])

    @staticmethod
    def _close(runners: Sequence[Any]) -> None:
        import sglang_distguard

        for runner in runners:
            sglang_distguard.close(runner)


def guarded(
    name: str, contents: Mapping[str, Content], files: Mapping[str, Path]
) -> dict[str, Any]:
    """Run all cases of one architecture; problems by case, and the contents that show none."""
    import sglang_distguard
    import torch

    bits = {key: torch.load(file, weights_only=True) for key, file in files.items()}
    sglang_distguard.install()
    it = Guarded(name, contents, bits, Place(FOLDERS.work / f"{name}-guarded"))
    it.files()
    if "override" in contents:
        it.override()
    it.reopened()
    untold = [key for key in bits if key != "first" and bit_equal(bits["first"], bits[key])]
    return {"problems": it.problems, "untold": untold, "contents": list(contents)}


def compare(name: str, seconds: float) -> None:
    """Run one architecture, each runner alone and then all with the guard; save the row."""

    def made() -> list[str]:
        # In a process of its own: making a model starts OpenMP, which must not be before a fork.
        return [str(create(name, FOLDERS.models, seed=seed)) for seed in SEEDS]

    found = in_child(FOLDERS, f"{name}-checkpoints", seconds, made)
    if "failed" in found:
        _save(name, {"failed": f"no checkpoint: {found['failed']}", "where": found["where"]})
        return
    first, second = (Path(folder) for folder in found)
    contents = {"first": Content(first), "second": Content(second)}
    fields = changed(json.loads((first / "config.json").read_text()))
    if fields:
        contents["edited"] = Content(first, edited=fields)
        contents["override"] = Content(first, override=fields)
    files = {key: FOLDERS.work / f"{name}-{key}.pt" for key in contents}
    for key in contents:
        found = in_child(
            FOLDERS,
            f"{name}-alone-{key}",
            seconds,
            lambda key=key: alone(name, contents[key], files[key]),
        )
        if "failed" in found:
            _save(name, {"cannot": f"{key}: {found['failed']} ({found['where']})"})
            return
    result = in_child(FOLDERS, f"{name}-guarded", seconds, lambda: guarded(name, contents, files))
    if any(result.get("problems", {}).values()):
        result["undefined"] = not in_child(
            FOLDERS,
            f"{name}-disturbed",
            seconds,
            lambda: disturbed(name, contents["first"], files["first"]),
        ).get("same")
    _save(name, result)


def _save(name: str, result: Mapping[str, Any]) -> None:
    _row_file(name).write_text(json.dumps(result))


def _row_file(name: str) -> Path:
    return FOLDERS.work / f"{name}.row.json"


def row(name: str) -> list[str]:
    """The cells of one architecture: one for each of ``CASES``, and a note."""
    file = _row_file(name)
    if not file.is_file():
        return [*["FAILED"] * len(CASES), "the run itself failed"]
    result = json.loads(file.read_text())
    if "cannot" in result:
        return [*[""] * len(CASES), f"does not run alone: {result['cannot']}"]
    if "failed" in result:
        return [*["FAILED"] * len(CASES), f"{result['failed']} ({result['where']})"]
    if result.get("undefined"):
        told = "the bits differ alone, with other uninitialised memory or other random numbers"
        return [*[UNDEFINED] * len(CASES), told]
    notes = [f"{case}: {it}" for case in CASES for it in result["problems"][case]]
    cells = [_cell(case, content, result) for case, content in CASES.items()]
    return [*cells, "; ".join(notes).replace("|", "\\|")]


def _cell(case: str, content: str, result: Mapping[str, Any]) -> str:
    if content not in result["contents"]:
        return "no such field"
    if result["problems"][case]:
        return OTHER
    return UNTOLD if content in result["untold"] else SAME


def main() -> int:
    """Run the architectures; return 1 if any runner had other bits, or failed, with the guard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of a run that was interrupted"
    )
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time (default 1)")
    parser.add_argument(
        "--seconds", type=float, default=600, help="deadline of a step (default 600)"
    )
    options = parser.parse_args()
    unknown = set(options.only or ()) - set(CATALOG)
    if unknown:
        parser.error(f"unknown architecture {', '.join(sorted(unknown))}")
    names = [name for name in CATALOG if not options.only or name in options.only]
    for folder in (FOLDERS.models, FOLDERS.work):
        folder.mkdir(parents=True, exist_ok=True)
    waiting = [name for name in names if not (options.resume and _row_file(name).is_file())]
    for name in waiting:
        _row_file(name).unlink(missing_ok=True)
    tqdm.monitor_interval = 0  # its thread would be lost in every fork
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare()
    in_parallel("same key", waiting, options.jobs, lambda name: compare(name, options.seconds))
    rows = {name: row(name) for name in names}
    for name, cells in rows.items():
        print(f"{name}: {' | '.join(cells)}")
    ran = {name: cells for name, cells in rows.items() if any(cells[:-1])}
    wrong = [name for name, cells in ran.items() if {OTHER, "FAILED"} & set(cells)]
    print(f"{len(ran)} ran, {len(wrong)} wrong, {len(rows) - len(ran)} do not run alone")
    head = HEAD.format(versions=versions(), same=SAME, untold=UNTOLD, undefined=UNDEFINED)
    kept = _documented(head) if options.only else {}
    lines = kept | {name: f"| {name} | {' | '.join(cells)} |\n" for name, cells in ran.items()}
    if kept or not options.only:
        DOCUMENT.write_text(head + "".join(lines[name] for name in CATALOG if name in lines))
    return int(bool(wrong))


def _documented(head: str) -> dict[str, str]:
    """The lines of the table in the document; none if it is of other versions."""
    text = DOCUMENT.read_text() if DOCUMENT.is_file() else ""
    if not text.startswith(head):
        return {}
    lines = text.removeprefix(head).splitlines(keepends=True)
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


if __name__ == "__main__":
    sys.exit(main())
