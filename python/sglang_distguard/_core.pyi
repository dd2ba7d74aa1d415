"""Native part of sglang_distguard: the registry of shared state and the router of scoped globals."""

from collections.abc import Callable
from contextvars import Token
from typing import Any, Literal, final

__all__ = [
    "Agreement",
    "Claim",
    "Request",
    "RunnerHandle",
    "Scope",
    "ScopedGlobal",
    "Teardown",
    "Visit",
    "__version__",
    "abandon_scope",
    "adopt_scope",
    "begin_exit",
    "begin_teardown",
    "choose_scope",
    "claim_vacant",
    "current_scope",
    "depth",
    "enter",
    "forget",
    "has_joined",
    "inherit",
    "is_ready",
    "leave",
    "live_runners",
    "live_scopes",
    "new_scope",
    "note_joined",
    "ready_keys",
    "reset",
    "resource",
    "snapshot",
    "start_afresh",
    "switch",
    "switch_back",
    "take_events",
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

    def wrote(self, index: int) -> None:
        """This rank wrote entry ``index``."""

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
class RunnerHandle:
    """What one runner holds: its scope and its leases, until closed or collected."""

    def __new__(
        cls, name: str, scope: Scope | None, keys: list[str], *, turns: str | None = None
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

    def enter(self) -> Token[Scope | None] | None:
        """Make the scope current for a method; give the result to ``leave``."""

    def begin_forward(self) -> None:
        """Claim the runner for a forward of the calling thread.

        Raises StateInUse when another thread is inside one.
        """

    def end_forward(self) -> None: ...
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

    def wait(self, seconds: float) -> None:
        """Sleep, detached from the interpreter, until the key changes or for ``seconds``."""

    def timed_out(self) -> Exception:
        """The AcquireTimeout of a caller that gives up."""

@final
class Visit:
    """One visit to a room, in line or inside; ends with ``leave`` or when it is dropped.

    Raises DeadlockError when waiting would never end, ValueError for an unknown room.
    """

    def __new__(cls, room: str, *, runner: str | None) -> Visit: ...
    def try_enter(self) -> bool: ...
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
def adopt_scope(scope: Scope | None, /) -> None: ...
def switch(scope: Scope | None, /) -> Token[Scope | None] | None: ...
def switch_back(token: Token[Scope | None] | None, /) -> None: ...
def enter(scope: Scope | None, /) -> Token[Scope | None] | None: ...
def leave(token: Token[Scope | None] | None, /) -> int: ...
def depth() -> int: ...
def note_joined(key: str, generation: int) -> None:
    """The current scope uses this generation of ``key`` from now on."""

def has_joined(key: str) -> bool:
    """Whether the current scope has joined ``key``, be it torn down since or not."""

def live_scopes() -> list[Scope]: ...
def new_scope(label: str) -> Scope: ...
def choose_scope(label: str) -> tuple[Scope | None, bool]: ...
def abandon_scope(scope: Scope | None, /) -> None: ...
def claim_vacant(scope: Scope | None, /) -> bool: ...
def live_runners(scope: Scope | None, /) -> int: ...
