"""Builds and runs real runners under observation, in this process: one with plain SGLang, or two with the guard.

The two are of different dtypes, and run one after the other and then at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Optional

from sglang_distguard.audit.observe import Key, Observation, observe, sglang_globals, source_files
from sglang_distguard.audit.traces import Trace, tracing, untraced
from sglang_distguard.audit.values import Value, kind_of

PHASES = (
    *("import", "publish", "init", "load", "pool", "backends", "graphs"),
    *("prefill", "decode", "weights", "close"),
)
_NOTHING = "(nothing)"


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


@dataclass(frozen=True, order=True)
class Ran:
    """A line that writes a process-global and ran, also when the global was the same after the phase.

    Attributes:
        module: in whose text it is.
        line: its number.
        phase: one of ``PHASES``.
        runner: as of a ``Change``.
    """

    module: str
    line: int
    phase: str
    runner: str


@dataclass(frozen=True)
class Run:
    """What one observed process did.

    Attributes:
        changes: what changed in it.
        kinds: [module, name, kind] of the globals of SGLang that could.
        files: module of SGLang's that it imported -> its source file.
        ran: which lines that write a global ran.
    """

    changes: list[Change]
    kinds: list[tuple[str, str, str]]
    files: dict[str, str]
    ran: list[Ran]


class Watch:
    """Compares what is with what was, phase by phase, and notes what ran in between."""

    def __init__(self, trace: Optional[Trace] = None) -> None:
        self.trace = Trace() if trace is None else trace
        self.changes: list[Change] = []
        self.ran: list[Ran] = []
        with untraced():
            self.last = observe()

    def of(self, runner: str) -> Callable[[str], None]:
        return lambda phase: self.after(runner, phase)

    def after(self, runner: str, phase: str) -> None:
        with untraced():
            now = observe()
            self.changes += differences(self.last, now, phase=phase, runner=runner)
            self.ran += [Ran(*place, phase, runner) for place in self.trace.take()]
        self.last = now

    def take(self) -> Run:
        """What was seen since the last call of this; more may follow."""
        kinds = [(*key, kind) for key, thing in sglang_globals() if (kind := kind_of(thing))]
        taken = Run(self.changes, kinds, source_files(), self.ran)
        self.changes, self.ran = [], []
        return taken


def differences(before: Observation, now: Observation, *, phase: str, runner: str) -> list[Change]:
    """What changed. What came with a module that was imported in between did not, but for a cache
    that was asked since.
    """
    known = {module for module, _ in before}
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (old is None and new is not None and _came(key, new, known)):
            continue
        texts = [_NOTHING if it is None else it.text for it in (old, new)]
        found.append(Change(*key, phase, runner, *texts))
    return found


def _came(key: Key, new: Value, known: Set[str]) -> bool:
    """Whether it is there now because a module was imported."""
    return (key[0] not in known and not new.was_asked) or new.may_appear


@dataclass(frozen=True)
class Subject:
    """What is built and run.

    Attributes:
        build: ``build(number, after)`` builds runner 0 or 1; ``after`` is called with each phase.
        compute: ``compute(runner, number, activate=..., after=...)`` runs it, to the end.
    """

    build: Callable[..., Any]
    compute: Callable[..., Any]


def importing() -> Run:
    """Import SGLang in this process, which has not."""
    import torch  # noqa: F401  # its settings are looked at from here on

    from sglang_distguard.testing import prepare_environment

    trace = Trace()
    with tracing(trace):
        prepare_environment()  # imports half of SGLang; what it sets itself is no change of SGLang's
        watch = Watch(trace)
        others = {key: value for key, value in watch.last.items() if not _is_sglangs(key)}
        watch.changes += differences(others, watch.last, phase="import", runner="alone")
        import sglang.srt.managers.scheduler
        import sglang.srt.model_executor.model_runner  # noqa: F401

        watch.after("alone", "import")
    return watch.take()


def _is_sglangs(key: Key) -> bool:
    return key[0].partition(".")[0] == "sglang"


def alone(subject: Subject) -> Run:
    """Build and run runner 0 with plain SGLang, in this process, which has imported it."""
    watch = Watch()
    with tracing(watch.trace):
        runner = subject.build(0, watch.of("alone"))
        subject.compute(runner, 0, after=watch.of("alone"))
        del runner
        _tear_down()
        watch.after("alone", "close")
    return watch.take()


def together(subject: Subject) -> Run:
    """Build both with the guard, which is installed; run one after the other, then both at once."""
    import sglang_distguard

    watch = Watch()
    with tracing(watch.trace):
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
    return watch.take()


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


def _tear_down() -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.runtime_context import reset_context

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
    reset_context()
