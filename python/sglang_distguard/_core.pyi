"""Native part of sglang_distguard: registry of shared state, executions, scoped globals."""

import threading
from collections.abc import Callable
from types import CodeType, FunctionType, TracebackType
from typing import Any, Literal, final

from sglang_distguard._core_budgets import (
    Standing,
    count_memory,
    end_budget,
    measured_room,
    open_budget,
    promise_memory,
    promised_memory,
    standing_of,
)
from sglang_distguard._core_registry import (
    Claim,
    Request,
    Teardown,
    begin_teardown,
    forget,
    holders,
    is_ready,
    ready_keys,
    reset,
    resource,
)
from sglang_distguard._core_steps import Step, StepInTurn, StepOf, Through, step

__all__ = [
    "Activation",
    "Agreement",
    "Claim",
    "Entered",
    "Execution",
    "Locked",
    "OwnFlag",
    "Publishing",
    "Request",
    "RunnerHandle",
    "Scope",
    "ScopedGlobal",
    "Standing",
    "Step",
    "StepInTurn",
    "StepOf",
    "Teardown",
    "Through",
    "Vacancy",
    "Visit",
    "__version__",
    "activations",
    "adopt_execution",
    "begin_exit",
    "begin_teardown",
    "call_after_builds",
    "calls_inside",
    "carried_execution",
    "count_memory",
    "current_execution",
    "current_scope",
    "default_dtype_in_force",
    "depth",
    "end_budget",
    "forget",
    "give_own_code",
    "has_joined",
    "holders",
    "in_scope",
    "in_turn",
    "inherit",
    "is_ready",
    "live_residents",
    "live_runners",
    "live_scopes",
    "measured_room",
    "new_scope",
    "note_build",
    "note_intercepting",
    "note_joined",
    "open_budget",
    "owning_environment",
    "promise_memory",
    "promised_memory",
    "read_through_accessors",
    "ready_keys",
    "reset",
    "resource",
    "resuming",
    "run_as",
    "set_default_dtype",
    "snapshot",
    "standing_of",
    "start_afresh",
    "step",
    "take_events",
    "wake_all",
    "with_default_dtype",
]

__version__: str

@final
class Agreement:
    """State of the agreement between the ranks of one world, as read from their shared log.

    Stages are "ask", "begin", "turn" and "build" (rust/core/src/agreement.rs).
    """

    def __new__(cls) -> Agreement: ...
    def begin(self, name: str) -> int:
        """Begin work under ``name``; return the number of its round. Raises AmbiguousBuild."""

    def end(self, name: str) -> None:
        """End the work of this process under ``name``."""

    def arrive(self, name: str, round: int, stage_name: str) -> bool:
        """Note that this rank reports the stage to the others; False if it did so before."""

    def next(self) -> int:
        """Return the number of the first entry that was not read yet."""

    def apply(
        self, index: int, name: str, round: int, stage_name: str, failure: str | None
    ) -> bool:
        """Apply entry ``index``; False, without any effect, unless it is the next one."""

    def turn(self) -> tuple[str, int] | None:
        """Return the name and round that have the turn; None if there are none."""

    def enter(
        self, name: str, round: int
    ) -> tuple[Literal["open", "passed", "failed"], str | None]:
        """Like ``stands`` of "begin"; if that is passed, this rank has begun its turn."""

    def leave(self, name: str, round: int) -> None:
        """End this rank's turn, if it is in it, after it has undone what it must undo."""

    def began(self, name: str, round: int) -> bool | None:
        """Whether the round has had the turn; None if the entries read so far do not tell."""

    def read_own(self, index: int) -> None:
        """Note that this rank read entry ``index`` and wrote it itself; call before ``apply``."""

    def wrote(self, index: int) -> bool:
        """Note that this rank wrote entry ``index``; False if no rank will read it there."""

    def outlived(self, name: str, round: int, stage_name: str) -> list[int]:
        """Return entries of this rank that no rank reads again: all have reported the stage."""

    def lose(self, reason: str) -> None:
        """Note that the log cannot be read any more: every open stage has failed."""

    def stands(
        self, name: str, round: int, stage_name: str
    ) -> tuple[Literal["open", "passed", "failed"], str | None]:
        """Return how the stage stands and, if it failed, why."""

    def begin_wait(self, name: str, round: int, stage_name: str) -> bool:
        """Add a waiter for the end of the stage; True if the caller must start a reader."""

    def end_wait(self, name: str, round: int, stage_name: str) -> None: ...
    def next_to_read(self) -> int | None:
        """Return the entry to read next; None, which ends the reading, if no thread waits."""

    def end_reading(self) -> None:
        """Note that the reading thread could not be started."""

    def is_reading(self) -> bool: ...
    def wait(self, name: str, round: int, stage_name: str, seconds: float) -> None:
        """Sleep, detached from the interpreter, until the stage may have ended."""

@final
class Scope:
    """One runner's own values of SGLang's module globals.

    SGLang's default scope is the module globals themselves. It is None where a Scope is expected.
    """

    @property
    def id(self) -> int: ...
    @property
    def label(self) -> str: ...
    @label.setter
    def label(self, value: str) -> None: ...
    def clear(self) -> None:
        """Drop every value; a global that is read afterwards gets its initial value."""

@final
class ScopedGlobal:
    """Accessor of one module global or class attribute; ``value`` is the current scope's."""

    def __new__(
        cls, owner: dict[str, Any] | type, name: str, initial: Callable[[], Any]
    ) -> ScopedGlobal: ...
    @property
    def value(self) -> Any: ...
    @value.setter
    def value(self, value: Any) -> None: ...
    @value.deleter
    def value(self) -> None: ...
    def value_in(self, scope: Scope | None, /) -> Any:
        """The value in ``scope``; a scope without one gets the initial value."""

    def set_value_in(self, scope: Scope | None, value: Any, /) -> None: ...
    def is_set_in(self, scope: Scope, /) -> bool:
        """Whether ``scope`` has its own value, because it was read or written there before."""

@final
class Locked:
    """Holds ``lock`` in a with block, or raises ``timed_out()`` after ``timeout`` seconds."""

    def __new__(
        cls, lock: threading.RLock, timeout: float, timed_out: Callable[[], BaseException]
    ) -> Locked: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class OwnFlag:
    """Accessor of a module flag; ``value`` is ``here()`` if that is true, else the process's."""

    def __new__(cls, globals: dict[str, Any], name: str, here: Callable[[], bool]) -> OwnFlag: ...
    @property
    def value(self) -> Any: ...
    @value.setter
    def value(self, value: Any) -> None: ...

@final
class Execution:
    """Whose code is running, and what it carries. Immutable; it lives in one context variable.

    None in place of an Execution stands for code of no runner, which reads the default scope.
    """

    @property
    def scope(self) -> Scope | None: ...
    @property
    def runner(self) -> RunnerHandle | None:
        """Runner whose method or ``activate`` block the code is in."""

    @property
    def depth(self) -> int:
        """How many runner methods and ``activate`` blocks the code is nested in."""

    @property
    def step(self) -> str | None:
        """Name of the runner's method that is running, until it ends."""

    @property
    def default_dtype(self) -> Any: ...
    @property
    def turn(self) -> Any: ...
    @property
    def owns_environment(self) -> bool:
        """Whether environment variables that are set belong to a scope, not to the process."""

@final
class Entered:
    """Context manager for another execution; dropping the object leaves the block, too."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class Activation:
    """Context manager: the code is the runner's, outside of its methods; gives the runner."""

    def __new__(cls, handle: RunnerHandle, runner: Any) -> Activation: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class Publishing:
    """Context manager for one publish: enters its scope and holds its claim.

    The end of the with block undoes both, unless it ends without an error after ``succeed``.
    """

    def __new__(
        cls, label: str, *, is_other: Callable[[], bool], may_put_aside: bool
    ) -> Publishing:
        """``is_other()``: whether the current scope has a configuration, and another one."""

    @property
    def is_fresh(self) -> bool:
        """Whether the scope was made for this publish."""

    def __enter__(self) -> Publishing: ...
    def __exit__(
        self, error: type[BaseException] | None, *_more: BaseException | TracebackType | None
    ) -> None: ...
    def succeed(self) -> None: ...

@final
class Vacancy:
    """Context manager that claims a scope; gives False if a runner is built or lives there."""

    def __new__(cls, scope: Scope | None, /) -> Vacancy: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class RunnerHandle:
    """Scope and leases that one runner, or a manager, holds until it is closed or collected."""

    def __new__(
        cls,
        name: str,
        scope: Scope | None,
        keys: list[str],
        *,
        turns: str | None = None,
        ranks: bool = False,
        manager: str | None = None,
    ) -> RunnerHandle: ...
    @property
    def name(self) -> str: ...
    @property
    def manager(self) -> str | None:
        """Name of the manager's class; None for a runner."""

    @property
    def turns(self) -> str | None:
        """Name under which the runner takes turns on all ranks; None if it need not."""

    @property
    def scope(self) -> Scope | None: ...
    @property
    def closed(self) -> bool: ...
    def use_device(self, index: int) -> None:
        """Have the runner's code compute on this CUDA device, from whichever thread."""

    def hold(self, key: str) -> None:
        """Hold one more lease, on ``key``."""

    def release_key(self, key: str) -> bool:
        """Release the leases on ``key`` alone; False if there are none."""

    def check(self) -> None:
        """Raise DistGuardError if closed, ForkedError in a forked child, or LeaseBroken."""

    def inside(self) -> list[tuple[str, str | None]]:
        """Return (thread, method) of other threads in a runner's and its drafts' methods, or of every
        call in a manager's, for which its end waits.
        """

    def inside_here(self) -> str | None:
        """Return the method of a manager that the calling thread is in, if any."""

    def keep_runner(self, handle: RunnerHandle) -> None:
        """Note that this manager has built the runner of ``handle``."""

    @property
    def runners(self) -> list[RunnerHandle]:
        """What was kept with ``keep_runner``, oldest first."""

    @property
    def stream(self) -> Any:
        """The CUDA stream of its own (``runner.streams``), if any; steps call its begin and end."""

    @stream.setter
    def stream(self, stream: Any) -> None: ...
    def keep_part(self, end: Callable[[], object]) -> None:
        """Have ``end`` called when the manager ends."""

    def take_parts(self) -> list[Callable[[], object]]:
        """Return what was kept with ``keep_part``, once, oldest first."""

    def end(self) -> bool:
        """Refuse a manager's methods from now on; return False if ``end`` was called before."""

    def end_if_vacant(self) -> bool:
        """Refuse a manager's methods from now on if no call is inside; return whether it does."""

    def wait_for_calls(self, seconds: float) -> None:
        """Sleep, detached, until a call has left since ``end_if_vacant``, or for ``seconds``."""

    def begin_collectives(self) -> bool:
        """Claim the communicators of the runner's scope for a step of the calling thread; False if an
        outer step has. Raises StateInUse if another thread is in a step of a runner that uses them.
        """

    def end_collectives(self) -> None: ...
    def close(self) -> bool:
        """Release everything the runner holds; False if that was done before."""

@final
class Visit:
    """One visit to a phase, in line or inside; ends with ``leave`` or when it is dropped.

    Raises DeadlockError if waiting would never end, ValueError for an unknown phase.
    """

    def __new__(
        cls, phase: str, *, runner: str | None, handle: RunnerHandle | None = None
    ) -> Visit: ...
    def try_enter(self) -> bool: ...
    @property
    def patience(self) -> float:
        """Infinite: every change wakes the waiter."""

    def wait(self, seconds: float) -> None: ...
    def timed_out(self) -> Exception: ...
    def leave(self) -> bool: ...

def start_afresh() -> None:
    """Begin with an empty registry; a forked child calls this before anything else."""

def inherit(key: str, identity: int) -> None:
    """Refuse requests for ``key`` that find this object, which was inherited over a fork."""

def take_events() -> list[dict[str, Any]]:
    """Return the events that no earlier call returned."""

def wake_all() -> None:
    """Wake every waiting thread, so that it looks again."""

def begin_exit(grace: float) -> int:
    """Stop other threads at their next wait or runner method, wait up to ``grace`` seconds for those
    inside a method, and return how many still are; then the caller ends the process.
    """

def snapshot() -> dict[str, Any]: ...
def current_scope() -> Scope | None: ...
def current_execution() -> Execution | None: ...
def adopt_execution(execution: Execution | None, /) -> None:
    """Make ``execution`` current for the calling code, until it is changed again."""

def carried_execution() -> Execution | None:
    """Return the running execution for another thread, where its dtype is held separately."""

def run_as(execution: Execution | None, /) -> Entered: ...
def in_scope(scope: Scope | None, /) -> Entered:
    """Make ``scope`` current; the code in the with block belongs to no runner yet."""

def in_turn(turn: Any, /) -> Entered: ...
def owning_environment() -> Entered:
    """Treat environment variables set in the with block as a runner's, in any scope."""

def resuming(scope: Scope | None, /) -> Entered:
    """Resume, in a with block, a publish in ``scope`` whose runner is not built yet."""

def with_default_dtype(dtype: Any, /) -> Entered: ...
def set_default_dtype(dtype: Any, /) -> None:
    """Set the default dtype of the running execution, until it ends or sets another one."""

def default_dtype_in_force() -> Any: ...
def note_intercepting(intercepts: bool) -> bool:
    """Note whether the calling thread intercepts torch's default dtype; return the former note."""

def calls_inside() -> list[tuple[str, str, str]]:
    """Return (thread, manager, method) of every call that is inside a manager's method."""

def activations() -> list[tuple[str, str]]:
    """Return (thread, runner) of every ``Activation`` that is entered now."""

def depth() -> int: ...
def note_joined(key: str, generation: int) -> None:
    """Note that the current scope uses this generation of ``key`` from now on."""

def has_joined(key: str) -> bool:
    """Whether the current scope has joined ``key``, even if it was torn down since."""

def live_scopes() -> list[Scope]: ...
def call_after_builds(call: Callable[[], object] | None, /) -> None:
    """Make every build that ends while no scope exists call ``call``."""

def give_own_code(function: FunctionType, own: CodeType, code: CodeType) -> None:
    """Give ``function``, whose ``code`` reads through accessors, its ``own``, unless a scope exists.

    The next scope takes it away.
    """

def read_through_accessors() -> None:
    """Take away what ``give_own_code`` has given."""

def note_build() -> None:
    """Note that a runner was built."""

def new_scope(label: str) -> Scope: ...
def live_runners(scope: Scope | None, /) -> int: ...
def live_residents(scope: Scope | None, /) -> int:
    """Return how many runners and managers live in ``scope``."""
