"""Native part of sglang_distguard: the registry of shared state and the router of scoped globals."""

from collections.abc import Callable
from contextvars import Token
from typing import Any, Literal, final

__all__ = [
    "Claim",
    "RunnerHandle",
    "Scope",
    "ScopedGlobal",
    "Teardown",
    "__version__",
    "abandon_scope",
    "acquire",
    "adopt_scope",
    "begin_teardown",
    "choose_scope",
    "current_scope",
    "depth",
    "enter",
    "forget",
    "is_ready",
    "leave",
    "live_runners",
    "live_scopes",
    "new_scope",
    "reset",
    "resource",
    "snapshot",
    "switch",
    "switch_back",
]

__version__: str

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
    """Stands for one module global; ``value`` is the current scope's."""

    def __new__(
        cls, namespace: dict[str, Any], name: str, initial: Callable[[], Any]
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

    def __new__(cls, name: str, scope: Scope | None, keys: list[str]) -> RunnerHandle: ...
    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope | None: ...
    @property
    def closed(self) -> bool: ...
    def hold(self, key: str) -> None:
        """Take one more lease."""

    def check(self) -> None:
        """Raise DistGuardError when closed, ForkedError in a forked child."""

    def enter(self) -> Token[Scope | None] | None:
        """Make the scope current for a method; give the result to ``leave``."""

    def begin_forward(self) -> None:
        """Claim the runner for a forward of the calling thread.

        Raises StateInUse when another thread is inside one.
        """

    def end_forward(self) -> None: ...
    def close(self) -> bool:
        """Release everything; False when that was done before."""

@final
class Claim:
    """What ``acquire`` decided. A leader that drops it without a result has failed."""

    @property
    def decision(self) -> Literal["lead", "adopt", "join", "nested"]: ...
    @property
    def waited(self) -> float: ...
    @property
    def resource(self) -> Any: ...
    def publish(
        self, *, identity: int, resource: Any, spec: dict[str, Any] | None = None
    ) -> None: ...
    def fail(self, reason: str) -> None: ...
    def poison(self, reason: str) -> None: ...

@final
class Teardown:
    """State that is closed for teardown. Dropped without a result, it is poisoned."""

    @property
    def origin(self) -> Literal["created", "adopted"] | None: ...
    @property
    def resource(self) -> Any: ...
    def end(self) -> None: ...
    def poison(self, reason: str) -> None: ...

def acquire(
    key: str,
    spec: dict[str, Any],
    *,
    runner: str | None,
    reuse: bool,
    reentrant: bool,
    timeout: float,
    observe: Callable[[], int | None],
) -> Claim:
    """Lead, adopt, join or go on nested.

    Waits for another thread's initialisation detached from the interpreter, in slices of 50 ms
    between which signals are handled.

    Raises SpecMismatch, StateInUse, AcquireTimeout, DeadlockError or PoisonedState.
    """

def is_ready(key: str) -> bool: ...
def resource(key: str) -> Any: ...
def forget(key: str) -> bool: ...
def begin_teardown(key: str, *, runner: str | None, force: bool) -> Teardown: ...
def reset(*, force: bool) -> None: ...
def snapshot() -> dict[str, Any]: ...
def current_scope() -> Scope | None: ...
def adopt_scope(scope: Scope | None, /) -> None: ...
def switch(scope: Scope | None, /) -> Token[Scope | None] | None: ...
def switch_back(token: Token[Scope | None] | None, /) -> None: ...
def enter(scope: Scope | None, /) -> Token[Scope | None] | None: ...
def leave(token: Token[Scope | None] | None, /) -> int: ...
def depth() -> int: ...
def live_scopes() -> list[Scope]: ...
def new_scope(label: str) -> Scope: ...
def choose_scope(label: str, live_threads: list[int]) -> tuple[Scope | None, bool]: ...
def abandon_scope(scope: Scope | None, /) -> None: ...
def live_runners(scope: Scope | None, /) -> int: ...
