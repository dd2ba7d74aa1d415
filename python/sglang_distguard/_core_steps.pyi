"""The part of `_core` that is about steps (rust/src/step.rs); no module of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, final

from sglang_distguard._core import RunnerHandle

@final
class Step:
    """Context manager for a method of a runner: checks its leases and enters its phase.

    Raises DistGuardError, ForkedError, LeaseBroken, StateInUse, AcquireTimeout or DeadlockError.
    Dropping the object leaves the step, too.
    """

    def __enter__(self) -> None: ...
    def __exit__(self, _class: object, _error: object, _trace: object) -> None: ...

@final
class StepInTurn:
    """Context manager for a method that computes with other ranks, in a turn that is in force.

    Raises what ``collective_steps`` raises for such a step. Dropping the object leaves the step, too.
    """

    def __enter__(self) -> None: ...
    def __exit__(self, _class: object, _error: object, _trace: object) -> bool: ...

@final
class Through:
    """Context manager that does nothing: the code is already in a step that covers it."""

    def __enter__(self) -> None: ...
    def __exit__(self, _class: object, _error: object, _trace: object) -> None: ...

@final
class StepOf:
    """Called with a runner, or an object that refers to one, returns the with block of one method.

    Args:
        name: name of the method.
        phase: phase of the method, if any.
        exclusive: admit one thread at a time.
        counts: whether the end of a manager waits for the method.
        runner: attribute of the argument, or attributes with dots: the runner, or what returns it.
        otherwise: called with handle and name to make the with block if there are several ranks.
        always_otherwise: call ``otherwise`` with one rank, too.
        in_turns: make a native step of it where a turn of several steps is in force, and what
            ``otherwise`` returns only for what is refused there.
    """

    def __new__(
        cls,
        name: str,
        phase: str | None,
        *,
        exclusive: bool = False,
        counts: bool = True,
        runner: str | None = None,
        otherwise: Callable[[RunnerHandle, str], AbstractContextManager[Any]] | None = None,
        always_otherwise: bool = False,
        in_turns: bool = False,
    ) -> StepOf: ...
    def __call__(self, owner: Any, /) -> AbstractContextManager[Any]: ...
    def holding(self, owner: Any, /) -> AbstractContextManager[Any]:
        """Return a with block in which the end of ``owner``, a manager, waits; nothing else."""

def step(
    handle: RunnerHandle, name: str, phase: str | None, *, exclusive: bool = False
) -> Step: ...
