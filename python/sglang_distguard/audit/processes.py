"""The observed processes: one process imports SGLang and forks one child for each run.

``python -m sglang_distguard.audit.processes FOLDER SECONDS CASES`` takes CASES as a JSON list. It
writes the observations of each run into ``FOLDER`` as JSON, and a line to standard output whenever
a run is done. Importing SGLang 0.5.23 uses CUDA where there is a GPU, and then a forked process
could not use it. There, each run imports SGLang itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from sglang_distguard_plugin import VARIABLE

from sglang_distguard.audit import runs
from sglang_distguard.audit.cases import Case
from sglang_distguard.audit.runs import Change, Ran, Run
from sglang_distguard.audit.sources import source_of
from sglang_distguard.testing import children

_MODULE = "sglang_distguard.audit.processes"
_DONE = "sglang_distguard.audit: done"
_SECONDS = 600
#: Runs at a time; each needs about 2 GiB.
_AT_ONCE = 2
_TOLD = 4000


def run_all(
    cases: Sequence[Case], *, seconds: float = _SECONDS, done: Callable[[], object] = lambda: None
) -> list[Run]:
    """Import SGLang, build and run each case alone and together; return all observations.

    Args:
        cases: what to build and run.
        seconds: limit after which the import or a run is killed.
        done: called after each run.

    Raises:
        RuntimeError: a process failed or took too long; the text has the end of its error output.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [sys.executable, "-m", _MODULE, folder, str(seconds), _as_json(cases)],
            env={name: text for name, text in os.environ.items() if name != VARIABLE},
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
        [(module, name) for module, name in found["cut"]],
        [(module, name) for module, name in found["unread"]],
    )


def _as_json(cases: Sequence[Case]) -> str:
    return json.dumps([asdict(case) for case in cases])


def follow(starts: Mapping[str, Callable[[], int]], folder: Path, seconds: float) -> None:
    """Start a process with each of ``starts``, a few at a time, and wait for all.

    Args:
        starts: name -> function that starts a child of this process and returns its id.
        folder: folder of the children's output, in NAME.log.
        seconds: limit after which each child kills itself.

    Raises:
        RuntimeError: a child failed; the others are killed.
    """
    waiting, running = list(starts), dict[int, str]()
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                name = waiting.pop(0)
                running[starts[name]()] = name
            child, status = os.wait()
            name = running.pop(child, "")
            if status != 0:
                what = _end_of(os.waitstatus_to_exitcode(status), seconds)
                log = _log(folder / name).read_text(errors="replace")
                raise RuntimeError(f"the audit's run of {name} {what}:\n{log[-_TOLD:]}")
            print(_DONE, flush=True)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def fork(work: Callable[[], Run], result: Path, seconds: float) -> int:
    """Run ``work`` in a forked child, which is killed after ``seconds``.

    The child writes the return value of ``work`` to ``result``.json.
    """

    def observed() -> None:
        _end_after(seconds)
        _write(result, work())

    return children.fork(observed, _log(result))


def _spawn(case: Case, how: str, result: Path, seconds: float) -> int:
    """Like ``fork``, but in a process that imports SGLang itself."""
    told = [str(result), str(seconds), _as_json([case]), how]
    return os.posix_spawn(sys.executable, [sys.executable, "-m", _MODULE, *told], os.environ)


def _end_after(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends it wherever it hangs


def _log(result: Path) -> Path:
    return Path(f"{result}.log")


def _write(result: Path, run: Run) -> None:
    Path(f"{result}.json").write_text(json.dumps(asdict(run)))


def _read_models(files: Mapping[str, str]) -> None:
    """Read the text of SGLang's models, which every run imports first, once for all runs."""
    package = "sglang.srt.models"
    for file in Path(files["sglang"]).parent.joinpath("srt", "models").glob("*.py"):
        source_of(f"{package}.{file.stem}", str(file))


def _alone(case: Case) -> Run:
    return runs.alone(case.subject(), detailed=case.detailed)


def _together(case: Case) -> Run:
    import sglang_distguard

    sglang_distguard.install()
    return runs.together(case.subject(), detailed=case.detailed)


HOW: Mapping[str, Callable[[Case], Run]] = {"alone": _alone, "together": _together}


def main(arguments: Sequence[str]) -> None:
    """Run as the process that imports SGLang, or as the process of a single run."""
    place, seconds, cases, *single = arguments
    given = [Case(**case) for case in json.loads(cases)]
    if single:
        children.end_with_parent()
        children.print_to(_log(Path(place)))
        _end_after(float(seconds))
        runs.imported()
        _write(Path(place), HOW[single[0]](given[0]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a closed runner may leave threads that no code waits for
    try:
        _run_cases(given, Path(place), float(seconds))
    except RuntimeError as error:
        sys.exit(str(error))


def _run_cases(cases: Sequence[Case], folder: Path, seconds: float) -> None:
    import torch

    _end_after(seconds)
    run = runs.importing()
    _end_after(0)
    _write(folder / "import", run)
    can_fork = not torch.cuda.is_initialized()
    if can_fork:
        _read_models(run.files)
    starts: dict[str, Callable[[], int]] = {}
    for case in cases:
        for how in case.runs:
            work = HOW[how]
            name = f"{case.name} {how}"
            starts[name] = (
                partial(fork, partial(work, case), folder / name, seconds)
                if can_fork
                else partial(_spawn, case, how, folder / name, seconds)
            )
    follow(starts, folder, seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
