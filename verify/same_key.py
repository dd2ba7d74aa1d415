"""Runs runners that agree in every key and differ in content, and writes docs/SAME_KEY.md.

A memory of SGLang, transformers or torch that is keyed by path, name, shapes or requests gives the
second of two such runners what it computed for the first. For each architecture:

- Weights: two checkpoints of one configuration lie at one path, one after the other. The second runner
  is built while the first one lives; both then compute at once.
- Configuration: two runners of one path and the same files differ in what
  ``json_model_override_args`` changes (no shape). They are built and compute at once.
- Reopened: both are closed, the first checkpoint's files are put back at the path, and a third runner
  is built there.

Requests, request ids, prompts and the runners' settings are the same. Each runner is compared, bit for
bit, with the same runner in a process of its own without the guard.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from architecture_outcomes import versions
from architecture_steps import M_PERTURB, SEEDS, Folders, compute, failure, in_child
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

SAME, OTHER = "bit-equal", "OTHER BITS"
UNTOLD, UNDEFINED = "the same alone", "undefined alone"
HEAD = """# Same key, other content

Runners of one process that agree in everything that a memory could be keyed by (path, file names, shapes,
settings, prompts, request ids) and differ in content. `make same-key` runs them for every architecture
that runs alone on a CPU ([ARCHITECTURES.md](ARCHITECTURES.md)) and writes this file. {versions}.

- **Weights**: two checkpoints with one configuration at one path, the second put there while a runner of
  the first lives; both then compute at once, three times.
- **Configuration**: one path and the same files, built at once from two threads; the second has other
  values in `json_model_override_args` (norm epsilons, rope base, scales), which change no shape.
- **Reopened**: both runners closed, the first checkpoint put back at the path, a third runner built.

"{same}" means that every runner has the bits that it has in a process of its own without the guard.
"{untold}" means that both contents give the same bits alone, so that nothing could be mixed up.
"{undefined}" means that the bits of a runner alone depend on uninitialised memory.

| architecture | weights | configuration | reopened | note |
|---|---|---|---|---|
"""


class Place:
    """The path at which one checkpoint lies at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model"

    def put(self, checkpoint: Path) -> Path:
        """Replace the files at the path by copies of those of ``checkpoint``."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(checkpoint, self.path)
        return self.path


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with the second runner's values."""
    found = {name: config[name] * factor for name, factor in FACTORS.items() if config.get(name)}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_theta"):
        theta = rope["rope_theta"] * FACTORS["rope_theta"]
        found["rope_parameters"] = {**rope, "rope_theta": theta}
    return found


def build(name: str, path: Path, override: Mapping[str, Any]) -> Any:
    """A runner of the checkpoint at ``path``, by SGLang's own steps."""
    from sglang_distguard.testing.recipe import server_args

    settings: dict[str, Any] = {"dtype": "float32", **CATALOG[name].overrides}
    if override:
        settings["json_model_override_args"] = json.dumps(override)
    return steps.build(server_args(path, **settings))


def alone(name: str, checkpoint: Path, override: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Build and run one runner without the guard; save its bits in ``file``."""
    import sglang_distguard
    import torch

    if sglang_distguard.is_installed():
        raise RuntimeError("the guard is installed; a runner alone must run without it")
    runner = build(name, Place(file.with_suffix("")).put(checkpoint), override)
    torch.save(compute(CATALOG[name], runner, None), file)
    return {}


def disturbed(name: str, file: Path) -> dict[str, Any]:
    """Whether the first runner has its bits alone again, with other uninitialised memory."""
    import torch

    ctypes.CDLL(None).mallopt(M_PERTURB, 0x55)
    again = file.with_suffix(".again.pt")
    alone(name, create(name, FOLDERS.models, seed=SEEDS[0]), {}, again)
    before, after = (torch.load(it, weights_only=True) for it in (file, again))
    return {"same": bit_equal(before, after)}


class Guarded:
    """The runners of one architecture in this process, with the guard."""

    def __init__(self, name: str, alone: Mapping[str, torch.Tensor], place: Place) -> None:
        self._name = name
        self._alone = alone
        self._place = place
        self.problems: dict[str, list[str]] = {"weights": [], "configuration": [], "reopened": []}

    def check(self, what: str, key: str, runner: Any) -> None:
        """Note where the runner has other bits than alone."""
        import sglang_distguard

        found = compute(CATALOG[self._name], runner, None, activate=sglang_distguard.activate)
        if not bit_equal(found, self._alone[key]):
            off = max_abs_error(found, self._alone[key])
            nearest = [it for it in self._alone if bit_equal(found, self._alone[it])]
            told = f"has those of {nearest[0]}" if nearest else f"differs by {off:.3g}"
            self.problems[what].append(f"{key} {told}")

    def weights(self, checkpoints: Sequence[Path]) -> None:
        """Two checkpoints at one path, one after the other; then both at once."""
        runners = []
        for key, checkpoint in zip(("first", "second"), checkpoints, strict=True):
            runners.append(build(self._name, self._place.put(checkpoint), {}))
            self.check("weights", key, runners[-1])
        self._at_once("weights", lambda key: runners[("first", "second").index(key)])
        self._close(runners)

    def configuration(self, checkpoint: Path, override: Mapping[str, Any]) -> None:
        """One path, two configurations, at once."""
        path = self._place.put(checkpoint)
        runners: list[Any] = []

        def made(key: str) -> Any:
            runners.append(build(self._name, path, override if key == "overridden" else {}))
            return runners[-1]

        self._at_once("configuration", made, keys=("first", "overridden"))
        self._close(runners)

    def reopened(self, checkpoint: Path) -> None:
        """A third runner, of the first files, after the others were closed."""
        runner = build(self._name, self._place.put(checkpoint), {})
        self.check("reopened", "first", runner)
        self._close([runner])

    def _at_once(
        self, what: str, runner_of: Callable[[str], Any], keys: Sequence[str] = ("first", "second")
    ) -> None:
        start = threading.Barrier(len(keys))

        def work(key: str) -> None:
            try:
                start.wait()
                runner = runner_of(key)
                start.wait()
                for _ in range(ROUNDS):
                    self.check(what, key, runner)
            except threading.BrokenBarrierError:
                pass  # another thread reports the reason
            except BaseException as error:
                told = failure(error)
                self.problems[what].append(f"{key}: {told['failed']} ({told['where']})")
                start.abort()

        threads = [threading.Thread(target=work, args=(key,), name=key) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @staticmethod
    def _close(runners: Sequence[Any]) -> None:
        import sglang_distguard

        for runner in runners:
            sglang_distguard.close(runner)


def guarded(name: str, override: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """Run all cases of one architecture; problems by case, and the cases that could show none."""
    import sglang_distguard
    import torch

    bits = {key: torch.load(file, weights_only=True) for key, file in files.items()}
    checkpoints = [create(name, FOLDERS.models, seed=seed) for seed in SEEDS]
    sglang_distguard.install()
    it = Guarded(name, bits, Place(FOLDERS.work / f"{name}-guarded"))
    it.weights(checkpoints)
    if override:
        it.configuration(checkpoints[0], override)
    it.reopened(checkpoints[0])
    untold = [key for key in bits if key != "first" and bit_equal(bits["first"], bits[key])]
    return {"problems": it.problems, "untold": untold, "override": sorted(override)}


def compare(name: str, seconds: float) -> None:
    """Run one architecture, each runner alone and then all with the guard; save the row."""

    def made() -> list[str]:
        # In a process of its own: making a model starts OpenMP, which must not be before a fork.
        return [str(create(name, FOLDERS.models, seed=seed)) for seed in SEEDS]

    found = in_child(FOLDERS, f"{name}-checkpoints", seconds, made)
    if "failed" in found:
        _save(name, {"failed": f"no checkpoint: {found['failed']}", "where": found["where"]})
        return
    checkpoints = [Path(folder) for folder in found]
    override = changed(json.loads((checkpoints[0] / "config.json").read_text()))
    cases = {"first": (checkpoints[0], {}), "second": (checkpoints[1], {})}
    if override:
        cases["overridden"] = (checkpoints[0], override)
    files = {key: FOLDERS.work / f"{name}-{key}.pt" for key in cases}
    for key, (checkpoint, changes) in cases.items():
        label = f"{name}-alone-{key}"
        found = in_child(
            FOLDERS, label, seconds, lambda it=(checkpoint, changes, files[key]): alone(name, *it)
        )
        if "failed" in found:
            _save(name, {"cannot": f"{key}: {found['failed']} ({found['where']})"})
            return
    result = in_child(FOLDERS, f"{name}-guarded", seconds, lambda: guarded(name, override, files))
    if any(result.get("problems", {}).values()):
        result["undefined"] = not in_child(
            FOLDERS, f"{name}-disturbed", seconds, lambda: disturbed(name, files["first"])
        ).get("same")
    _save(name, result)


def _save(name: str, result: Mapping[str, Any]) -> None:
    _row_file(name).write_text(json.dumps(result))


def _row_file(name: str) -> Path:
    return FOLDERS.work / f"{name}.row.json"


def row(name: str) -> list[str]:
    """The cells of one architecture after its name; the last one is the note."""
    file = _row_file(name)
    if not file.is_file():
        return ["FAILED", "FAILED", "FAILED", "the run itself failed"]
    result = json.loads(file.read_text())
    if "cannot" in result:
        return ["", "", "", f"does not run alone: {result['cannot']}"]
    if "failed" in result:
        return ["FAILED", "FAILED", "FAILED", f"{result['failed']} ({result['where']})"]
    problems, notes = result["problems"], []
    if result.get("undefined"):
        return [*[UNDEFINED] * 3, "the bits differ alone with other uninitialised memory"]
    cells = []
    for what, content in (("weights", "second"), ("configuration", "overridden"), ("reopened", "")):
        notes += [f"{what}: {problem}" for problem in problems[what]]
        cell = OTHER if problems[what] else SAME
        if cell == SAME and content in result["untold"]:
            cell = UNTOLD
        cells.append(cell)
    if not result["override"]:
        cells[1] = "no such field"
    return [*cells, "; ".join(notes).replace("|", "\\|")]


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
    ran = {name: cells for name, cells in rows.items() if any(cells[:3])}
    wrong = [name for name, cells in ran.items() if {OTHER, "FAILED"} & set(cells)]
    print(f"{len(ran)} ran, {len(wrong)} wrong, {len(rows) - len(ran)} do not run alone")
    if not options.only:
        head = HEAD.format(versions=versions(), same=SAME, untold=UNTOLD, undefined=UNDEFINED)
        lines = [f"| {name} | {' | '.join(cells)} |\n" for name, cells in ran.items()]
        DOCUMENT.write_text(head + "".join(lines))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
