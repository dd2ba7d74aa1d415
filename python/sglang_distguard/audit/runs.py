"""Builds and runs real runners under observation, in this process.

This is one runner with plain SGLang, or two runners with the guard. The two have different dtypes.
They run one after the other and then at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Optional

from sglang_distguard.audit import libraries
from sglang_distguard.audit.libraries import was_imported
from sglang_distguard.audit.observe import Key, Observation, observe, source_files
from sglang_distguard.audit.sources import uncollected
from sglang_distguard.audit.traces import Trace, tracing, untraced
from sglang_distguard.audit.values import Value, texts

PHASES = (
    *("import", "publish", "init", "load", "pool", "backends", "graphs"),
    *("prefill", "decode", "weights", "close"),
)
#: What is observed in detail, and of the second runner. The rest counts to the next one.
_DETAILS = frozenset(PHASES) - {"pool", "backends"}
_ENDS = frozenset(["graphs", "prefill", "decode", "weights"])
#: Ends of building and of computing: an observation takes longer than most phases.
_COARSE = frozenset(["graphs", "decode", "weights"])
_NOTHING = "(nothing)"


@dataclass(frozen=True)
class Change:
    """One process-global that a phase changed.

    Attributes:
        module: where it is.
        name: of the global; "Class.attribute" for a class's.
        phase: one of ``PHASES``.
        runner: "alone" (plain SGLang); "first", "second", "both" (guarded).
        before: text of its value before the phase.
        after: text of its value after the phase.
    """

    module: str
    name: str
    phase: str
    runner: str
    before: str
    after: str


@dataclass(frozen=True, order=True)
class Ran:
    """A line that ran and writes a process-global, even if the phase left the global unchanged.

    Attributes:
        module: module that contains the line.
        line: its number.
        phase: one of ``PHASES``.
        runner: as in ``Change``.
    """

    module: str
    line: int
    phase: str
    runner: str


@dataclass(frozen=True)
class Run:
    """The observations of one process.

    Attributes:
        changes: what changed in it.
        kinds: [module, name, kind] of SGLang's globals that can change.
        files: each imported SGLang module -> its source file.
        ran: the lines that ran and write a global.
        cut: [module, name] of the globals that hold more than was read.
        unread: [module, name] of the types of objects that SGLang's globals hold and whose state no
            Python code can read.
    """

    changes: list[Change]
    kinds: list[tuple[str, str, str]]
    files: dict[str, str]
    ran: list[Ran]
    cut: list[tuple[str, str]] = field(default_factory=list)
    unread: list[tuple[str, str]] = field(default_factory=list)


class Watch:
    """Compares the globals before and after each phase, and records the writes in between."""

    def __init__(self, trace: Optional[Trace] = None) -> None:
        self.trace = Trace() if trace is None else trace
        self.changes: list[Change] = []
        self.ran: list[Ran] = []
        #: What had changed before lines that may restore it; the phase is not known yet.
        self._meanwhile: dict[Key, tuple[str, str]] = {}
        with untraced():
            self.last = observe()
            self.libraries = libraries.libraries()

    def of(self, runner: str, phases: Set[str]) -> Callable[[str], None]:
        """Return a function to call after each phase; it observes ``phases`` only."""
        return lambda phase: self.after(runner, phase) if phase in phases else None

    def before_restoring(self) -> None:
        """Record what has changed since the last phase: the next line may restore it."""
        now = observe()
        with uncollected():
            for it in differences(self.last, now, phase="", runner=""):
                self._meanwhile[it.module, it.name] = it.before, it.after

    def after(self, runner: str, phase: str) -> None:
        with untraced():
            now = observe()  # whether garbage is collected, too
            with uncollected():
                others = libraries.libraries(self.libraries)
                self.changes += differences(self.last, now, phase=phase, runner=runner)
                self.changes += [
                    Change(*key, phase, runner, *told)
                    for key, *told in libraries.differences(self.libraries, others)
                ]
                self.ran += [Ran(*place, phase, runner) for place in self.trace.take()]
        found = {(it.module, it.name) for it in self.changes if it.phase == phase}
        self.changes += [
            Change(*key, phase, runner, *told)
            for key, told in self._meanwhile.items()
            if key not in found
        ]
        self._meanwhile.clear()
        self.last, self.libraries = now, others

    def take(self) -> Run:
        """Return what was seen since the last call of this method; more may follow."""
        own = {key: value for key, value in self.last.items() if _is_sglangs(key)}
        kinds = [(*key, kind) for key, value in own.items() if (kind := value.kind)]
        cut = [key for key, value in self.last.items() if value.is_cut]
        held = {node.unread for value in own.values() for node, _, _ in value.nodes}
        unread = sorted((it.__module__, it.__qualname__) for it in held if it is not None)
        taken = Run(self.changes, kinds, source_files(), self.ran, cut, unread)
        self.changes, self.ran = [], []
        return taken


def differences(before: Observation, now: Observation, *, phase: str, runner: str) -> list[Change]:
    """The globals that changed.

    A global of a module that was imported in between is no change, unless it is a cache that was
    asked since.
    """
    known = {module for module, _ in before}
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or (old is None and new is not None and _came(key, new, known)):
            continue
        if old is not None and new is not None:
            told = texts(old, new)
        else:
            told = [_NOTHING if it is None else it.text for it in (old, new)]
        found.append(Change(*key, phase, runner, *told))
    return found


def _came(key: Key, new: Value, known: Set[str]) -> bool:
    """Whether a global is new because a module was imported."""
    if new.may_appear or (key[0] not in known and not new.was_asked):
        return True
    return not _is_sglangs(key) and was_imported(*key, new.thing)


@dataclass(frozen=True)
class Subject:
    """How to build and run the runners.

    Attributes:
        build: ``build(number, after)`` builds runner 0 or 1; ``after`` is called with each phase.
        compute: ``compute(runner, number, activate=..., after=...)`` runs the runner to the end.
        drafts: ``drafts(runner)`` returns the draft runners that were built with a runner.
    """

    build: Callable[..., Any]
    compute: Callable[..., Any]
    drafts: Callable[[Any], Sequence[Any]] = lambda _runner: ()


def importing() -> Run:
    """Import SGLang in this process, which has not imported it before."""
    import torch  # noqa: F401  # its settings are observed from here on

    from sglang_distguard.testing import prepare_environment

    trace = Trace()
    with tracing(trace):
        prepare_environment()  # imports half of SGLang; its own settings are no change by SGLang
        watch = Watch(trace)
        others = {key: value for key, value in watch.last.items() if not _is_sglangs(key)}
        watch.changes += differences(others, watch.last, phase="import", runner="alone")
        _import()
        watch.after("alone", "import")
    return watch.take()


def imported() -> None:
    """Import SGLang in this process as ``importing`` does, and observe nothing, which is faster."""
    from sglang_distguard.testing import prepare_environment

    prepare_environment()
    _import()


def _import() -> None:
    import sglang.srt.managers.scheduler
    import sglang.srt.model_executor.model_runner  # noqa: F401


def _is_sglangs(key: Key) -> bool:
    return key[0].partition(".")[0] == "sglang"


def alone(subject: Subject, *, detailed: bool = True) -> Run:
    """Build and run runner 0 with plain SGLang, in this process, which has imported it.

    ``detailed``: whether each phase is observed, or only the ends of building and computing.
    """
    watch = Watch()
    with tracing(watch.trace):
        after = watch.of("alone", _DETAILS if detailed else _COARSE)
        runner = subject.build(0, after)
        subject.compute(runner, 0, after=after)
        del runner
        _tear_down()
        watch.after("alone", "close")
    return watch.take()


def together(subject: Subject, *, detailed: bool = True) -> Run:
    """Build both runners with the installed guard; run one after the other, then both at once.

    ``detailed``: as for ``alone``.
    """
    import sglang_distguard

    phases = (_DETAILS, _ENDS) if detailed else (_COARSE, _COARSE)

    watch = Watch()
    watch.trace.before_restoring = watch.before_restoring
    with tracing(watch.trace):
        runners = []
        for number, name in enumerate(("first", "second")):
            after = watch.of(name, phases[number])
            with sglang_distguard.runner_scope(name):
                runner = subject.build(number, after)
            subject.compute(runner, number, activate=sglang_distguard.activate, after=after)
            runners.append(runner)
            del runner
        _at_once(subject, runners)
        watch.after("both", "decode")
        while runners:
            runner = runners.pop()
            drafts = list(subject.drafts(runner))
            while drafts:
                sglang_distguard.close(drafts.pop())
            sglang_distguard.close(runner)
            del runner
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
