"""Native part of sglang_distguard: the registry of shared state and the router of scoped globals."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal, final

__all__ = [
    "Activation",
    "Agreement",
    "Claim",
    "Entered",
    "Execution",
    "OwnFlag",
    "Publishing",
    "Request",
    "RunnerHandle",
    "Scope",
    "ScopedGlobal",
    "Step",
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
    "carried_execution",
    "current_execution",
    "current_scope",
    "default_dtype_in_force",
    "depth",
    "forget",
    "has_joined",
    "in_scope",
    "in_turn",
    "inherit",
    "is_ready",
    "live_runners",
    "live_scopes",
    "new_scope",
    "note_intercepting",
    "note_joined",
    "owning_environment",
    "ready_keys",
    "reset",
    "resource",
    "resuming",
    "run_as",
    "set_default_dtype",
    "snapshot",
    "start_afresh",
    "step",
    "take_events",
    "wake_all",
    "with_default_dtype",
]

__version__: str

@final
class Agreement:
    """What the ranks of one world agreed on, as far as this process has read their log.

    Stages are "ask", "begin", "turn" and "build" (rust/core/src/agreement.rs).
    """

    def __new__(cls) -> Agreement: ...
    def begin(self, name: str) -> int:
        """Work under ``name`` from now on; the number of the round. Raises AmbiguousBuild."""

    def end(self, name: str) -> None:
        """Nobody works here under ``name`` any more."""

    def arrive(self, name: str, round: int, stage_name: str) -> bool:
        """Whether this rank has not told the others yet how the stage went for it."""

    def next(self) -> int:
        """The number of the entry that was not read yet."""

    def apply(
        self, index: int, name: str, round: int, stage_name: str, failure: str | None
    ) -> bool:
        """Take in entry ``index``; False unless it is the next one."""

    def turn(self) -> tuple[str, int] | None:
        """Name and round of who has the turn."""

    def enter(
        self, name: str, round: int
    ) -> tuple[Literal["open", "passed", "failed"], str | None]:
        """As ``stands`` of "begin"; when that is passed, this rank is inside of the turn."""

    def leave(self, name: str, round: int) -> None:
        """This rank is out of the turn, if it was inside, and has undone what is to be."""

    def began(self, name: str, round: int) -> bool | None:
        """Whether the round has had the turn; None when what was read does not tell."""

    def read_own(self, index: int) -> None:
        """This rank has read entry ``index`` and wrote it itself; before ``apply``."""

    def wrote(self, index: int) -> bool:
        """This rank wrote entry ``index``; False when that is where nobody will read it any more."""

    def outlived(self, name: str, round: int, stage_name: str) -> list[int]:
        """Entries of this rank that nobody reads again, now that all ranks have told of the stage."""

    def lose(self, reason: str) -> None:
        """The log cannot be read any more: every open stage has failed."""

    def stands(
        self, name: str, round: int, stage_name: str
    ) -> tuple[Literal["open", "passed", "failed"], str | None]:
        """How the stage stands, and why it failed."""

    def begin_wait(self, name: str, round: int, stage_name: str) -> bool:
        """One more waits for the stage to end; True when the caller must start a reader."""

    def end_wait(self, name: str, round: int, stage_name: str) -> None: ...
    def next_to_read(self) -> int | None:
        """What the reader reads next; None when nobody waits, and it is the reader no more."""

    def end_reading(self) -> None:
        """The thread that was to read could not be started."""

    def is_reading(self) -> bool: ...
    def wait(self, name: str, round: int, stage_name: str, seconds: float) -> None:
        """Sleep, detached, until the stage may have ended."""

@final
class Scope:
    """One runner's own values of SGLang's module globals.

    SGLang's default scope, the module globals themselves, is None wherever a Scope is expected.
    """

    @property
    def id(self) -> int: ...
    @property
    def label(self) -> str: ...
    @label.setter
    def label(self, value: str) -> None: ...
    def clear(self) -> None:
        """Drop every value; globals read afterwards start afresh."""

@final
class ScopedGlobal:
    """Stands for one global of a module, or attribute of a class; ``value`` is the current scope's."""

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
        """Whether ``scope`` has a value of its own, read or written before."""

@final
class OwnFlag:
    """Stands for a flag of a module; ``value`` is true where ``here()`` is, else the process's."""

    def __new__(cls, globals: dict[str, Any], name: str, here: Callable[[], bool]) -> OwnFlag: ...
    @property
    def value(self) -> Any: ...
    @value.setter
    def value(self, value: Any) -> None: ...

@final
class Execution:
    """Whose code is running, and what it carries. Immutable; it lives in one context variable.

    No Execution at all, None, is code of no runner, which reads SGLang's default scope.
    """

    @property
    def scope(self) -> Scope | None: ...
    @property
    def runner(self) -> RunnerHandle | None:
        """Whose method or ``activate`` the code is in."""

    @property
    def depth(self) -> int:
        """How many methods and ``activate`` blocks of runners the code is nested in."""

    @property
    def step(self) -> str | None:
        """Name of the method that runs, until it ends."""

    @property
    def default_dtype(self) -> Any: ...
    @property
    def turn(self) -> Any: ...
    @property
    def owns_environment(self) -> bool:
        """Whether what is written into the environment belongs to a scope, not to the process."""

@final
class Entered:
    """A with block in which another execution is in force; left also when it is dropped."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class Step:
    """A with block that is a method of a runner: its leases are good, its phase is entered.

    Raises DistGuardError, ForkedError, LeaseBroken, StateInUse, AcquireTimeout or DeadlockError.
    Left also when it is dropped.
    """

    def __enter__(self) -> None: ...
    def __exit__(self, _class: object, _error: object, _trace: object) -> None: ...

@final
class Through:
    """A with block that does nothing: the code is in a step that covers it."""

    def __enter__(self) -> None: ...
    def __exit__(self, _class: object, _error: object, _trace: object) -> None: ...

@final
class StepOf:
    """Called with a runner, or what refers to one, returns the with block of one method of it.

    Args: the method's name; its phase; ``exclusive``, for one thread at a time; ``runner``, the
    attribute of the argument, or attributes with dots, that is the runner or returns it; ``otherwise``, called with handle and
    name for the with block where there are several ranks, or always.
    """

    def __new__(
        cls,
        name: str,
        phase: str | None,
        *,
        exclusive: bool = False,
        runner: str | None = None,
        otherwise: Callable[[RunnerHandle, str], AbstractContextManager[Any]] | None = None,
        always_otherwise: bool = False,
    ) -> StepOf: ...
    def __call__(self, owner: Any, /) -> AbstractContextManager[Any]: ...

@final
class Activation:
    """A with block in which the code is a runner's, in no method of it; gives the runner."""

    def __new__(cls, handle: RunnerHandle, runner: Any) -> Activation: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class Publishing:
    """One publish: in its scope, and holding its claim, from ``__enter__`` on.

    Given back at the end of the with block, unless it ends without an error after ``succeed``.
    """

    def __new__(cls, label: str, *, is_other: bool, may_put_aside: bool) -> Publishing: ...
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
    """A with block that has a scope to itself, if nobody builds or runs there: then it gives True."""

    def __new__(cls, scope: Scope | None, /) -> Vacancy: ...
    def __enter__(self) -> bool: ...
    def __exit__(self, *_error: object) -> None: ...

@final
class RunnerHandle:
    """What one runner holds: its scope and its leases, until closed or collected."""

    def __new__(
        cls,
        name: str,
        scope: Scope | None,
        keys: list[str],
        *,
        turns: str | None = None,
        ranks: bool = False,
    ) -> RunnerHandle: ...
    @property
    def name(self) -> str: ...
    @property
    def turns(self) -> str | None:
        """The name under which it takes turns with others on all ranks; None when it need not."""

    @property
    def scope(self) -> Scope | None: ...
    @property
    def closed(self) -> bool: ...
    def hold(self, key: str) -> None:
        """Take one more lease."""

    def check(self) -> None:
        """Raise DistGuardError when closed, ForkedError in a forked child, LeaseBroken."""

    def inside(self) -> list[tuple[str, str | None]]:
        """(thread, method) of what other threads do with the runner, or with drafts of it, now."""

    def begin_collectives(self) -> bool:
        """Claim the communicators of the runner's scope for a step of the calling thread.

        False inside of another such step of that thread. Raises StateInUse when another thread is in a step of a runner that uses them.
        """

    def end_collectives(self) -> None: ...
    def close(self) -> bool:
        """Release everything; False when that was done before."""

@final
class Request:
    """One caller's wish to have a key initialised, from the first try to the decision."""

    def __new__(
        cls,
        key: str,
        spec: dict[str, Any],
        *,
        runner: str | None,
        reuse: bool,
        reentrant: bool,
        slow_after: float,
    ) -> Request: ...
    def try_acquire(self, identity: int | None, /) -> Claim | None:
        """Decide; None means ``wait``, look at the process again and ask again.

        ``identity`` is that of the live object, None when there is none.
        Raises SpecMismatch, StateInUse, DeadlockError, PoisonedState or ForkedError.
        """

    @property
    def patience(self) -> float:
        """Seconds after which it must be looked at again: the leader may be slow."""

    def wait(self, seconds: float) -> None:
        """Sleep, detached from the interpreter, until the key changes or for ``seconds``."""

    def timed_out(self) -> Exception:
        """The AcquireTimeout of a caller that gives up."""

@final
class Visit:
    """One visit to a phase, in line or inside; ends with ``leave`` or when it is dropped.

    Raises DeadlockError when waiting would never end, ValueError for an unknown phase.
    """

    def __new__(
        cls, phase: str, *, runner: str | None, handle: RunnerHandle | None = None
    ) -> Visit: ...
    def try_enter(self) -> bool: ...
    @property
    def patience(self) -> float:
        """Infinite: whatever changes wakes it."""

    def wait(self, seconds: float) -> None: ...
    def timed_out(self) -> Exception: ...
    def leave(self) -> bool: ...

@final
class Claim:
    """What was decided. A leader that drops it without a result has failed."""

    @property
    def decision(self) -> Literal["lead", "adopt", "join", "nested"]: ...
    @property
    def waited(self) -> float: ...
    @property
    def generation(self) -> int:
        """Of what was joined or published; 0 before."""
    @property
    def pending(self) -> bool:
        """Whether the caller leads and has not given a result yet."""
    @property
    def resource(self) -> Any: ...
    def publish(
        self, *, identity: int, resource: Any, spec: dict[str, Any] | None = None
    ) -> None: ...
    def fail(self, reason: str) -> None: ...
    def poison(self, reason: str) -> None: ...

@final
class Teardown:
    """State that is closed for teardown.

    Dropped without a result (an interrupt may come at any moment) it is as it was before ``start``,
    and poisoned after.
    """

    @property
    def origin(self) -> Literal["created", "adopted"] | None: ...
    @property
    def resource(self) -> Any: ...
    def start(self) -> None: ...
    def end(self) -> None: ...
    def cancel(self, reason: str) -> None:
        """Give the state back as it was, leases and all."""

    def poison(self, reason: str) -> None: ...

def start_afresh() -> None:
    """Begin without history; for a forked child, before anything else."""

def inherit(key: str, identity: int) -> None:
    """Refuse requests for ``key`` that see this object, which came over a fork."""

def take_events() -> list[dict[str, Any]]:
    """Return the events that no earlier call returned."""

def wake_all() -> None:
    """Let whoever waits look again."""

def begin_exit(grace: float) -> int:
    """Stop other threads at their next wait or runner's method; the calling one ends the process.

    Waits up to ``grace`` seconds for threads inside a method; returns how many still are.
    """

def is_ready(key: str) -> bool: ...
def resource(key: str) -> Any: ...
def forget(key: str) -> bool: ...
def begin_teardown(key: str, *, runner: str | None, force: bool) -> Teardown: ...
def reset(*, force: bool) -> None: ...
def ready_keys() -> list[str]:
    """Every key whose state can be joined now."""

def snapshot() -> dict[str, Any]: ...
def current_scope() -> Scope | None: ...
def current_execution() -> Execution | None: ...
def adopt_execution(execution: Execution | None, /) -> None:
    """Make it the calling code's own, until it is changed again."""

def carried_execution() -> Execution | None:
    """The running execution, to be carried to another thread: its dtype is held there anew."""

def run_as(execution: Execution | None, /) -> Entered: ...
def in_scope(scope: Scope | None, /) -> Entered:
    """Make ``scope`` current; the code in the with block is of no runner yet."""

def in_turn(turn: Any, /) -> Entered: ...
def owning_environment() -> Entered:
    """What the with block writes into the environment is a runner's, in the default scope, too."""

def resuming(scope: Scope | None, /) -> Entered:
    """Go on, in a with block, with what was published in ``scope`` and not built yet."""

def with_default_dtype(dtype: Any, /) -> Entered: ...
def set_default_dtype(dtype: Any, /) -> None:
    """Make ``dtype`` that of the running execution, until it ends or it is set again."""

def step(
    handle: RunnerHandle, name: str, phase: str | None, *, exclusive: bool = False
) -> Step: ...
def default_dtype_in_force() -> Any: ...
def note_intercepting(intercepts: bool) -> bool:
    """Whether the calling thread intercepts torch's default dtype; returns what was noted before."""

def activations() -> list[tuple[str, str]]:
    """(thread, runner) of every ``Activation`` that is entered now."""

def depth() -> int: ...
def note_joined(key: str, generation: int) -> None:
    """The current scope uses this generation of ``key`` from now on."""

def has_joined(key: str) -> bool:
    """Whether the current scope has joined ``key``, be it torn down since or not."""

def live_scopes() -> list[Scope]: ...
def new_scope(label: str) -> Scope: ...
def live_runners(scope: Scope | None, /) -> int: ...
