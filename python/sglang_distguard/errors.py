"""The errors distguard raises. Each says what exists, what was asked, who holds it, what to do."""

from __future__ import annotations

import sys
import traceback
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
        # Errors cross process borders (executors, multiprocessing); keyword facts must too.
        notes = getattr(self, "__notes__", None)
        state = {"__notes__": list(notes)} if notes else None
        return _rebuild, (type(self), str(self), self.details), state


def stack_of(thread: int | None) -> str:
    """The current Python stack of a thread, innermost call last; empty when it has ended."""
    frame = sys._current_frames().get(thread) if isinstance(thread, int) else None
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


def _rebuild(kind: type[DistGuardError], message: str, details: dict[str, Any]) -> DistGuardError:
    return kind(message, **details)


class SpecMismatch(DistGuardError, ValueError):
    """The state that exists was made for other settings than the ones asked for.

    ``details``: ``key``, ``fields`` (name -> {"existing", "requested"}), ``holders``, ``leader``.
    """


class AcquireTimeout(DistGuardError, TimeoutError):
    """Another thread was still initialising when the deadline passed.

    ``details``: ``key``, ``leader``, ``leading_for`` and ``waited`` (seconds), ``stack``.
    """

    def __init__(self, message: str, **details: Any) -> None:
        # Looked up once: where the error is unpickled, the number may be another thread's.
        if "leader_thread" in details and "stack" not in details:
            details["stack"] = stack_of(details["leader_thread"])
            if details["stack"]:
                message = f"{message}\nThat thread is now at:\n{details['stack']}"
        super().__init__(message, **details)

    def __str__(self) -> str:
        # TimeoutError is an OSError, whose __str__ looks for errno first.
        return str(self.args[0]) if self.args else ""


class AgreementTimeout(AcquireTimeout):
    """Other ranks did not ask for the same, or did not finish it, before the deadline passed.

    ``details``: ``name``, ``stage``, ``missing`` (ranks), ``waited`` (seconds), ``failures``.
    """


class RanksDisagree(SpecMismatch):
    """The ranks ask for different things under one name. ``details``: ``fields``, name -> rank -> value."""


class RankFailed(DistGuardError):
    """The build failed on another rank, and so on all. ``details``: ``failures``, rank -> error."""


def forget_frames(error: BaseException) -> None:
    """Drop what the ended frames of ``error``'s traceback refer to: runners, and so their weights.

    Also of the errors that it came from. What it says, and where it was raised, stays.
    """
    seen: set[int] = set()
    pending: list[Optional[BaseException]] = [error]
    while pending:
        it = pending.pop()
        if it is None or id(it) in seen:
            continue
        seen.add(id(it))
        traceback.clear_frames(it.__traceback__)
        pending += [it.__cause__, it.__context__]
        if isinstance(it, BaseExceptionGroup):
            pending += it.exceptions


class AmbiguousBuild(DistGuardError, ValueError):
    """Two threads build under one name on several ranks, which could not tell them apart.

    ``details``: ``name``, ``thread`` (the other one's name).
    """


class StoreLost(DistGuardError, ConnectionError):
    """The store through which the ranks agree cannot be reached. ``details``: ``reason``."""

    def __str__(self) -> str:
        # ConnectionError is an OSError, as in AcquireTimeout.
        return str(self.args[0]) if self.args else ""


class StateInUse(DistGuardError):
    """The state may not be reused or torn down now: runners hold it. ``details``: ``holders``."""


class PoisonedState(DistGuardError):
    """A failed initialisation could not be undone; ``reset()`` is needed first."""


class DeadlockError(DistGuardError):
    """Waiting would never end. ``details``: ``cycle``, the threads and what each waits for."""


class LeaseBroken(DistGuardError):
    """What the runner was built on was torn down by force, or changed behind the guard's back.

    ``details``: ``key``, ``by`` (who did it), ``how``.
    """


class ForkedError(DistGuardError):
    """The runner, or the world, was made in the parent process; a forked child cannot use it."""


class NotSupported(DistGuardError, NotImplementedError):
    """The installed SGLang lacks something distguard rests on, or a request is beyond it.

    Nothing was patched or built. ``details``: ``sglang`` (installed version), ``missing`` (what
    was looked for) and ``module``, or what was requested.
    """


class SubinterpreterError(NotSupported, ImportError):
    """The package was imported in a subinterpreter. ``details``: ``interpreter``, its number."""
