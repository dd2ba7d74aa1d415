"""The errors that the guard raises.

Each message states what exists, what was requested, the holders, and the remedy.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any, Optional


class DistGuardError(RuntimeError):
    """Base of all errors of sglang_distguard.

    Attributes:
        details: the facts of the message as plain data (JSON-able), for programs and logs.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details: dict[str, Any] = details

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are pickled between processes (executors, multiprocessing), with their details.
        notes = getattr(self, "__notes__", None)
        state = {"__notes__": list(notes)} if notes else None
        return _rebuild, (type(self), str(self), self.details), state


def stack_of(thread: int | None) -> str:
    """Return the current Python stack of a thread, innermost call last; empty when it has ended."""
    frame = sys._current_frames().get(thread) if isinstance(thread, int) else None
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _rebuild(kind: type[DistGuardError], message: str, details: dict[str, Any]) -> DistGuardError:
    return kind(message, **details)


class SpecMismatch(DistGuardError, ValueError):
    """State exists, or is being made, for other settings than the requested ones.

    ``details``: ``key``, ``fields`` (name -> {"existing", "requested"}), ``holders``, ``leader``.
    """


class AcquireTimeout(DistGuardError, TimeoutError):
    """The deadline passed while another thread initialised the state or was in a conflicting phase.

    ``details``: ``key``, ``waited`` (seconds), ``stack`` and ``holders``; where the state is being
    initialised, also ``leader`` and ``leading_for`` (seconds).
    """

    def __init__(self, message: str, **details: Any) -> None:
        # Read only once: in another process the number may belong to another thread.
        if "leader_thread" in details and "stack" not in details:
            details["stack"] = stack_of(details["leader_thread"])
            if details["stack"]:
                message = f"{message}\nThat thread is now at:\n{details['stack']}"
        super().__init__(message, **details)

    def __str__(self) -> str:
        # TimeoutError is an OSError, whose __str__ looks for errno first.
        return str(self.args[0]) if self.args else ""


class AgreementTimeout(AcquireTimeout):
    """Other ranks did not ask for the same, did not finish it, or gave no sign of life, in time.

    ``details``: ``name``, ``stage``, ``rank``, ``missing`` (ranks), ``waited`` (seconds), ``failures``
    (rank -> error); where ranks are missing also ``silent`` (whether they gave no sign of life), after
    a wait for the turn also ``holder``.
    """


class RanksDisagree(SpecMismatch):
    """The ranks ask for different settings under one name.

    ``details``: ``name``, ``stage``, ``rank``, ``fields`` (name -> rank -> value).
    """


class RankFailed(DistGuardError):
    """A build or step failed on another rank and was aborted on all ranks.

    ``details``: ``name``, ``stage``, ``rank``, ``failures`` (rank -> error).
    """


def forget_frames(error: BaseException) -> None:
    """Clear the ended frames of ``error``'s traceback, which refer to runners and their weights.

    Its causes, contexts and grouped errors are cleared too. Messages and tracebacks stay.
    """
    for it in with_causes(error):
        traceback.clear_frames(it.__traceback__)


def with_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, its causes, contexts and grouped errors, each once."""
    seen: set[int] = set()
    pending: list[Optional[BaseException]] = [error]
    while pending:
        it = pending.pop()
        if it is None or id(it) in seen:
            continue
        seen.add(id(it))
        yield it
        pending += [it.__cause__, it.__context__]
        if isinstance(it, BaseExceptionGroup):
            pending += it.exceptions


class AmbiguousBuild(DistGuardError, ValueError):
    """The guard cannot decide which runner is meant.

    Either two threads of a process work under one name on several ranks, or one ``ServerArgs``
    object was published more than once. ``details``: ``name`` and ``thread`` (name of the other
    thread), or ``scopes``.
    """


class StoreLost(DistGuardError, ConnectionError):
    """The store through which the ranks agree cannot be reached.

    ``details``: ``name``, ``stage``, ``rank``, ``reason``.
    """

    def __str__(self) -> str:
        # ConnectionError is an OSError, as in AcquireTimeout.
        return str(self.args[0]) if self.args else ""


class RunnerClosed(DistGuardError, AttributeError):
    """The runner is closed, and has no attributes any more. ``details``: ``runner``."""


class NotEnoughMemory(DistGuardError, MemoryError):
    """Less of the device's memory is left than the runner asks for, or its weights take all of it.

    ``details``: ``runner``, ``device``, ``asked`` (bytes, as all numbers), and ``left``, ``room`` and
    ``promised`` (a list of {"runner", "bytes"}), or ``weights`` and ``least``.
    """


class StateInUse(DistGuardError):
    """The state or the runner is in use, so the request is refused.

    ``details``: ``key`` and ``holders`` or ``leader`` of the state, or ``runner``.
    """


class PoisonedState(DistGuardError):
    """A failed initialisation or teardown could not be undone; ``reset()`` is needed first.

    ``details``: ``key``, ``reason``, ``leader``.
    """


class DeadlockError(DistGuardError):
    """The wait would never end. ``details``: ``cycle``, the threads and what each waits for."""


class LeaseBroken(DistGuardError):
    """State that the runner holds was torn down by force, or changed without the guard.

    ``details``: ``key``, ``by`` (the thread or runner that did it, or None), ``how``.
    """


class ForkedError(DistGuardError):
    """The runner, or the world, was made in the parent process; a forked child cannot use it."""


class NotSupported(DistGuardError, NotImplementedError):
    """The installed SGLang lacks something that the guard needs, or a request is not supported.

    Nothing was patched or built. ``details``: ``sglang`` (installed version), ``missing`` (the
    missing name) and ``module``, or what was requested.
    """


class EngineFailed(DistGuardError):
    """A thread of the engine has ended with an error, so its requests cannot be answered.

    ``__cause__`` is that error. ``details``: ``engine``, ``cause``.
    """


class EngineClosed(DistGuardError):
    """The engine was closed before the request was answered. ``details``: ``engine``."""


class UnknownEngine(DistGuardError, LookupError):
    """The pool has no such engine. ``details``: ``engine``, ``known`` (names)."""


class SubinterpreterError(NotSupported, ImportError):
    """The package was imported in a subinterpreter. ``details``: ``interpreter`` (its number)."""
