"""The processes that are observed: one imports SGLang, and forks one for each run.

``python -m sglang_distguard.audit.processes FOLDER SECONDS MODEL…`` writes what each saw into
``FOLDER``, as JSON, and a line to standard output whenever a run is done.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sglang_distguard.audit import runs
from sglang_distguard.audit.runs import Change, Ran, Run
from sglang_distguard.audit.sources import source_of
from sglang_distguard.settings import REUSE_VARIABLE

_MODULE = "sglang_distguard.audit.processes"
_DONE = "sglang_distguard.audit: done"
_SECONDS = 600
#: Runs, of about 2 GiB each.
_AT_ONCE = 2
_TOLD = 4000
_PR_SET_PDEATHSIG = 1


def run_all(
    models: Sequence[Path], *, seconds: float = _SECONDS, done: Callable[[], object] = lambda: None
) -> list[Run]:
    """Import SGLang, build and run each model alone and together; returns what each process saw.

    Args:
        models: folders of checkpoints.
        seconds: after which the import, or a run, is killed.
        done: called after each run.

    Raises:
        RuntimeError: a process failed or took too long; the text has the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", _MODULE, folder, str(seconds), *map(str, models)],
            env={name: text for name, text in os.environ.items() if name != REUSE_VARIABLE},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.strip() == _DONE:
                        done()
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0:
            errors.seek(0)
            what = _end_of(process.returncode, seconds)
            raise RuntimeError(f"the audit {what}:\n{errors.read()[-_TOLD:]}")
        return [_read(file) for file in sorted(Path(folder).glob("*.json"))]


def _end_of(status: int, seconds: float) -> str:
    if status == -signal.SIGALRM:
        return f"did not end within {seconds:g} s"
    return f"failed (exit status {status})"


def _read(file: Path) -> Run:
    found = json.loads(file.read_text())
    return Run(
        [Change(**change) for change in found["changes"]],
        [(module, name, kind) for module, name, kind in found["kinds"]],
        found["files"],
        [Ran(**ran) for ran in found["ran"]],
    )


def fork_each(works: Mapping[str, Callable[[], Run]], folder: Path, seconds: float) -> None:
    """Do each of ``works`` in a forked child, killed after ``seconds``; what it returns is in ``folder``.

    Raises:
        RuntimeError: one failed; the others are killed.
    """
    waiting, children = list(works), dict[int, str]()
    try:
        while waiting or children:
            while waiting and len(children) < _AT_ONCE:
                name = waiting.pop(0)
                children[_fork(works[name], folder / name, seconds)] = name
            child, status = os.wait()
            name = children.pop(child, "")
            if status != 0:
                what = _end_of(os.waitstatus_to_exitcode(status), seconds)
                log = (folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"the audit's run of {name} {what}:\n{log[-_TOLD:]}")
            print(_DONE, flush=True)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _fork(work: Callable[[], Run], result: Path, seconds: float) -> int:
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends it wherever it hangs
        with Path(f"{result}.log").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        Path(f"{result}.json").write_text(json.dumps(asdict(work())))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads and buffers of the parent are not ours to end
    raise AssertionError


def _read_models(files: Mapping[str, str]) -> None:
    """Read the text of what every run imports first of all, so that not each has to."""
    package = "sglang.srt.models"
    for file in Path(files["sglang"]).parent.joinpath("srt", "models").glob("*.py"):
        source_of(f"{package}.{file.stem}", str(file))


def main(arguments: Sequence[str]) -> None:
    """The process that imports SGLang."""
    folder, seconds, *models = arguments
    signal.setitimer(signal.ITIMER_REAL, float(seconds))
    run = runs.importing()
    signal.setitimer(signal.ITIMER_REAL, 0)
    (Path(folder) / "import.json").write_text(json.dumps(asdict(run)))
    _read_models(run.files)

    def alone(model: str) -> Run:
        return runs.alone(runs.subject_of(model))

    def together(model: str) -> Run:
        import sglang_distguard

        sglang_distguard.install()
        return runs.together(runs.subject_of(model))

    works: dict[str, Callable[[], Run]] = {}
    for model in models:
        works[f"{Path(model).name} alone"] = lambda model=model: alone(model)
        works[f"{Path(model).name} together"] = lambda model=model: together(model)
    try:
        fork_each(works, Path(folder), float(seconds))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
