"""The part of `_core` that is about the registry (rust/src/registry.rs); no module of its own."""

from typing import Any, Literal, final

@final
class Request:
    """One caller's request to have a key initialised, from the first try to the decision."""

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
        """Decide; on None the caller must ``wait``, look at the process again and retry.

        ``identity`` is the identity of the live object, None if there is no live object.
        Raises SpecMismatch, StateInUse, DeadlockError, PoisonedState or ForkedError.
        """

    @property
    def patience(self) -> float:
        """Seconds after which the caller must retry, so that a slow leader is noticed."""

    def wait(self, seconds: float) -> None:
        """Sleep, detached from the interpreter, until the key changes, at most ``seconds``."""

    def timed_out(self) -> Exception:
        """Return the AcquireTimeout for a caller that stops waiting."""

@final
class Claim:
    """Decision on a request. A leader that drops it without a result has failed."""

    @property
    def decision(self) -> Literal["lead", "adopt", "join", "nested"]: ...
    @property
    def waited(self) -> float: ...
    @property
    def generation(self) -> int:
        """Generation that was joined or published; 0 before that."""
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
    """One teardown of a key's state.

    It may be dropped without a result, for an interrupt may come at any moment. Then the state is
    as it was if ``start`` was not called, and poisoned otherwise.
    """

    @property
    def origin(self) -> Literal["created", "adopted"] | None: ...
    @property
    def resource(self) -> Any: ...
    def start(self) -> None: ...
    def end(self) -> None: ...
    def cancel(self, reason: str) -> None:
        """Restore the state as it was, with its leases."""

    def poison(self, reason: str) -> None: ...

def is_ready(key: str) -> bool: ...
def resource(key: str) -> Any: ...
def forget(key: str) -> bool: ...
def begin_teardown(key: str, *, runner: str | None, force: bool, why: str = "") -> Teardown:
    """Close ``key`` for teardown. With ``force``, those who lease it are told ``why``, if not empty."""

def reset(*, force: bool) -> None: ...
def holders(key: str) -> list[str]:
    """Return the names of the holders of ``key``, oldest first; none if it is not ready."""

def ready_keys() -> list[str]:
    """Return every key whose state can be joined now."""
