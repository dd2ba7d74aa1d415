"""Compares features of SGLang with the guard with the same alone, on one GPU, bit for bit.

``python verify/gpu_breadth.py MODELS [SECTION ...]`` makes small checkpoints in the folder MODELS.
Of each section, two checkpoints run alone with plain SGLang, each twice and in a process of its
own. Then one process with the guard builds both at once from two threads, and computes with both at
once. There is one line for each section. What plain SGLang alone cannot run here is "not run", and
what the guard refuses is "refused"; neither is a failure. With ``--tiny`` the program itself can be
tried on a CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import gpu_breadth_engines
import gpu_breadth_ipc
import gpu_breadth_kernels
import gpu_breadth_runners
from gpu_breadth_common import NO_CPU, Counted, Section, has_card, has_nan, same

#: How many processes with the guard run at a time.
GUARDED = 3
#: Of an error's text, in the line of a section.
WIDTH = 300
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Failed|NotSupported|Mismatch|Interrupt)\b.*")
_KINDS = (gpu_breadth_runners, gpu_breadth_kernels, gpu_breadth_engines, gpu_breadth_ipc)
SECTIONS: Mapping[str, Section] = {it.name: it for kind in _KINDS for it in kind.sections()}


class Failed(Exception):
    """A part has failed; its text is the last line of the error.

    Attributes:
        is_refusal: whether the guard has refused what was asked.
    """

    def __init__(self, text: str, *, is_refusal: bool = False) -> None:
        super().__init__(text)
        self.is_refusal = is_refusal


class Slots:
    """So many processes may run at a time; who came first is served first."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, wanted: int) -> Iterator[None]:
        """Wait for ``wanted`` slots, or all if there are fewer; hold them in the block."""
        number, mine = min(wanted, self._count), object()
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: self._waiting[0] is mine and self._free >= number)
            self._waiting.pop(0)
            self._free -= number
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += number
                self._changed.notify_all()


class Parts:
    """Runs parts of sections in processes of their own, so many at a time."""

    def __init__(self, models: Path, folder: Path, at_once: int) -> None:
        self._models, self._folder = models, folder
        self._alone = Slots(at_once)
        self._guarded = Slots(min(GUARDED, at_once))

    def alone(self, section: Section, seed: int, number: int) -> Path:
        """Run plain SGLang; return the file of its answer."""
        output = self._folder / f"{section.name}-{seed}-{number}.pt"
        with self._alone.taken(section.processes):
            self._run(section, output, "--alone", str(seed))
        return output

    def guarded(self, section: Section, references: Sequence[Path]) -> Counted:
        """Run the part with the guard; return what it has found."""
        import torch

        output = self._folder / f"{section.name}-guarded.pt"
        with self._guarded.taken(1):
            self._run(section, output, "--guarded", *map(str, references))
        return Counted(*torch.load(output))

    def _run(self, section: Section, output: Path, *part: str) -> None:
        command = [sys.executable, __file__, str(self._models), section.name]
        command += ["--output", str(output), *part]
        log = output.with_suffix(".log")
        limit = section.limit * (1 if has_card() else 4)  # a CPU may have other work beside
        with log.open("w") as said:
            process = subprocess.Popen(
                command,
                env={**os.environ, **section.environment},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # engines of plain SGLang have processes of their own
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        why = output.with_suffix(".error")
        if why.exists():
            kind, _, text = why.read_text().partition("\n")
            raise Failed(text, is_refusal=kind == "refused")
        if code is None:
            raise Failed(f"no end after {limit:g} s; {_last_line(log)}")
        if code or not output.exists():
            raise Failed(f"exit code {code}; {_last_line(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last_line(log: Path) -> str:
    """The last line that names an error, or else the last line."""
    lines = [it.strip() for it in log.read_text(errors="replace").splitlines() if it.strip()]
    errors = [it for it in lines if _ERROR.match(it)]
    return ([*lines, *errors] or ["nothing printed"])[-1][:WIDTH]


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def is_refusal(error: BaseException) -> bool:
    """Whether the guard has refused something, also inside of an engine that has failed by it."""
    from sglang_distguard import NotEnoughMemory, NotSupported, SpecMismatch, StateInUse

    return any(
        isinstance(it, (NotSupported, SpecMismatch, StateInUse, NotEnoughMemory))
        for it in _causes(error)
    )


def part(
    section: Section, models: Path, output: Path, seed: Optional[int], files: list[str]
) -> int:
    """Run one part in this process; write its answer, or why there is none."""
    import torch
    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    try:
        if seed is not None:
            torch.save(section.alone(models, seed), output)
        else:
            found = section.guarded(models, [torch.load(it) for it in files])
            torch.save([found.wrong, found.total, found.note], output)
    except BaseException as error:
        traceback.print_exc()
        root = list(_causes(error))[-1]
        text = f"{type(root).__name__}: {' '.join(str(root).split())}"[:WIDTH]
        kind = "refused" if is_refusal(error) else "failed"
        output.with_suffix(".error").write_text(f"{kind}\n{text}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads that a failed part has left would keep the process
    return 0


def line_of(section: Section, parts: Parts) -> tuple[str, bool]:
    """Run a section; return its line, and whether it is well."""
    import torch

    if section.needs_cuda and not has_card():
        return f"not run: {NO_CPU}", True
    wanted = [(seed, number) for seed in range(section.seeds) for number in (0, 1)]
    with ThreadPoolExecutor(len(wanted)) as pool:
        running = {it: pool.submit(parts.alone, section, *it) for it in wanted}
    try:
        files = {it: one.result() for it, one in running.items()}
    except Failed as error:
        return f"not run: plain SGLang alone does not run here: {error}", True
    answers = {it: torch.load(file) for it, file in files.items()}
    if any(map(has_nan, answers.values())):
        return "not compared: plain SGLang's own logits alone are not numbers here", True
    is_same = all(same(answers[it, 0], answers[it, 1]) for it in range(section.seeds))
    said = f"alone twice the same: {is_same}"
    if any(same(answers[0, 0], answers[it, 0]) for it in range(1, section.seeds)):
        return f"{said}; WRONG: two checkpoints answer alike", False
    try:
        found = parts.guarded(section, [files[it, 0] for it in range(section.seeds)])
    except Failed as error:
        if error.is_refusal:
            return f"refused: {error}", True
        return f"{said}; WRONG: with the guard it failed: {error}", False
    # Where plain SGLang has other bits each time, others with the guard show nothing.
    is_well = not (found.wrong and is_same)
    notes = [it for it in (found.note, section.note if has_card() else "") if it]
    said += f"; guarded at once: {found.wrong} of {found.total} with other bits"
    return "; ".join([said, *notes, *([] if is_well else ["WRONG"])]), is_well


def whole(models: Path, names: Sequence[str], keep: Optional[Path]) -> int:
    """Run these sections, many parts at a time; return the exit code."""
    begun = time.perf_counter()
    at_once = len(os.sched_getaffinity(0))
    wanted = [SECTIONS[it] for it in names]
    command = [sys.executable, __file__, str(models), *names, "--make"]
    if subprocess.run(command, timeout=180).returncode:
        return 1
    print(f"checkpoints after {time.perf_counter() - begun:.0f} s", flush=True)

    def run(section: Section, parts: Parts) -> bool:
        try:
            said, is_well = line_of(section, parts)
        except BaseException as error:  # of this program itself
            said, is_well = f"WRONG: {type(error).__name__}: {error}", False
        seconds = time.perf_counter() - begun
        print(f"{section.name}: {said} [{seconds:.0f} s]", flush=True)
        return is_well

    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(len(wanted)) as pool:
        folder = keep or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(
            "*.*"
        ):  # an answer of an earlier run must not be taken for a new one
            if old.suffix in (".pt", ".log", ".error"):
                old.unlink()
        parts = Parts(models, folder, at_once)
        well = [it.result() for it in [pool.submit(run, one, parts) for one in wanted]]
    print(f"{sum(well)} of {len(well)} well after {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if all(well) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="try the program itself on a CPU")
    parser.add_argument("--keep", type=Path, help="folder for the output of each process")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--guarded", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names: list[str] = options.sections or list(SECTIONS)
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.output:
        section = SECTIONS[names[0]]
        return part(section, options.models, options.output, options.alone, options.guarded or [])
    if options.make:
        for section in map(SECTIONS.__getitem__, names):
            for seed in range(section.seeds):
                section.make(options.models, seed)
        return 0
    import torch

    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(0), "torch", torch.__version__, flush=True)
    elif not options.tiny:
        print("skipped: there is no GPU here; with --tiny the program itself can be tried")
        return 0
    return whole(options.models, names, options.keep)


if __name__ == "__main__":
    sys.exit(main())
