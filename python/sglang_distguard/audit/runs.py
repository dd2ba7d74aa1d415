"""Builds and runs real runners under observation, in a process of its own.

``python -m sglang_distguard.audit.runs MODEL`` prints, as JSON, what changed: one runner with plain
SGLang; with ``--together`` two with the guard, of different dtypes, one after the other and then at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sglang_distguard.audit.observe import Observation, observe, sglang_globals, source_files
from sglang_distguard.audit.traces import Trace, tracing, untraced
from sglang_distguard.audit.values import kind_of
from sglang_distguard.settings import REUSE_VARIABLE

PHASES = (
    *("import", "publish", "init", "load", "pool", "backends", "graphs"),
    *("prefill", "decode", "close"),
)
_MODULE = "sglang_distguard.audit.runs"
_NOTHING = "(nothing)"
_SECONDS = 600


@dataclass(frozen=True)
class Change:
    """One process-global that was not the same after a phase as before.

    Attributes:
        module: where it is.
        name: of the global; "Class.attribute" for a class's.
        phase: one of ``PHASES``.
        runner: "alone" (plain SGLang); "first", "second", "both" (guarded).
        before: text of its value.
        after: text of its value.
    """

    module: str
    name: str
    phase: str
    runner: str
    before: str
    after: str


@dataclass(frozen=True)
class Run:
    """What one observed process did.

    Attributes:
        changes: what changed in it.
        kinds: [module, name, kind] of the globals of SGLang that could.
        files: module of SGLang's that it imported -> its source file.
        ran: [module, line] of the lines that write a global and ran after the import.
    """

    changes: list[Change]
    kinds: list[tuple[str, str, str]]
    files: dict[str, str]
    ran: list[tuple[str, int]]


def run(model: Path, *, together: bool, seconds: float = _SECONDS) -> Run:
    """Build and run ``model`` in a process that is observed, and killed after ``seconds``.

    Raises:
        RuntimeError: the process failed or took too long; the text has the end of its error output.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = ["--together"] if together else []
        try:
            ran = subprocess.run(
                [sys.executable, "-m", _MODULE, str(model), file.name, *options],
                env={name: text for name, text in os.environ.items() if name != REUSE_VARIABLE},
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as late:
            # Bytes, though text was asked for (CPython 3.11).
            printed = (late.stderr or b"").decode(errors="replace")
            raise RuntimeError(
                f"the audit's run of {model} did not end within {seconds:g} s:\n{printed[-4000:]}"
            ) from None
        if ran.returncode != 0:
            raise RuntimeError(
                f"the audit's run of {model} failed (exit status {ran.returncode}):\n"
                f"{ran.stderr[-4000:]}"
            )
        found = json.loads(Path(file.name).read_text())
        return Run(
            [Change(**change) for change in found["changes"]],
            [(module, name, kind) for module, name, kind in found["kinds"]],
            found["files"],
            [(module, line) for module, line in found["ran"]],
        )


class _Watch:
    """Compares what is with what was, phase by phase."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self._last = observe()

    def of(self, runner: str) -> Callable[[str], None]:
        return lambda phase: self.after(runner, phase)

    def after(self, runner: str, phase: str) -> None:
        with untraced():
            now = observe()
            self.changes += differences(self._last, now, phase=phase, runner=runner)
        self._last = now


def differences(before: Observation, now: Observation, *, phase: str, runner: str) -> list[Change]:
    """What changed. What came with a module that was imported in between did not."""
    known = {module for module, _ in before}
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (
            old is None and new is not None and (key[0] not in known or new.may_appear)
        ):
            continue
        texts = [_NOTHING if it is None else it.text for it in (old, new)]
        found.append(Change(*key, phase, runner, *texts))
    return found


@dataclass(frozen=True)
class Subject:
    """What is built and run.

    Attributes:
        build: ``build(number, after)`` builds runner 0 or 1; ``after`` is called with each phase.
        compute: ``compute(runner, number, activate=..., after=...)`` runs it, to the end.
    """

    build: Callable[..., Any]
    compute: Callable[..., Any]


def subject_of(model: str) -> Subject:
    """Two runners of one checkpoint, of different dtypes, that generate."""
    from sglang_distguard.testing import server_args, steps

    def build(number: int, after: Callable[[str], None]) -> Any:
        dtype = ("float32", "bfloat16")[number]
        return steps.build(server_args(model, dtype=dtype), after=after)

    def compute(runner: Any, number: int, **how: Any) -> None:
        steps.generate(runner, **how)

    return Subject(build, compute)


def alone(subject: Subject) -> Run:
    """Build and run runner 0 with plain SGLang, in this process, which has imported it."""
    watch = _Watch()
    with tracing() as trace:
        runner = subject.build(0, watch.of("alone"))
        subject.compute(runner, 0, after=watch.of("alone"))
        del runner
        _tear_down()
        watch.after("alone", "close")
    return _run(watch, trace)


def together(subject: Subject) -> Run:
    """Build both with the guard, which is installed; run one after the other, then both at once."""
    import sglang_distguard

    watch = _Watch()
    with tracing() as trace:
        runners = []
        for number, name in enumerate(("first", "second")):
            with sglang_distguard.runner_scope(name):
                runner = subject.build(number, watch.of(name))
            subject.compute(
                runner, number, activate=sglang_distguard.activate, after=watch.of(name)
            )
            runners.append(runner)
            del runner
        _at_once(subject, runners)
        watch.after("both", "decode")
        while runners:
            sglang_distguard.close(runners.pop())
        _tear_down()
        watch.after("both", "close")
    return _run(watch, trace)


def _at_once(subject: Subject, runners: Sequence[Any]) -> None:
    import sglang_distguard

    failed: list[BaseException] = []

    def compute(number: int) -> None:
        try:
            subject.compute(runners[number], number, activate=sglang_distguard.activate)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=compute, args=(number,)) for number in range(len(runners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _run(watch: _Watch, trace: Trace) -> Run:
    kinds = [(*key, kind) for key, thing in sglang_globals() if (kind := kind_of(thing))]
    return Run(watch.changes, kinds, source_files(), sorted(trace.ran))


def _tear_down() -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import reset_context

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    reset_context()


def main(arguments: Sequence[str]) -> None:
    """The process that is observed."""
    model, output, *options = arguments
    import torch  # noqa: F401  # its settings are looked at from here on

    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    imports = _Watch()
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401

    imports.after("alone", "import")
    if "--together" in options:
        import sglang_distguard

        sglang_distguard.install()
        found = together(subject_of(model))
    else:
        found = alone(subject_of(model))
        found = replace(found, changes=[*imports.changes, *found.changes])
    Path(output).write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
