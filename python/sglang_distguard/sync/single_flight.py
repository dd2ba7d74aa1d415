"""One caller initialises shared state, equal callers join it, unequal ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.sync import event_log, waiting

Observe = Callable[[], Optional[int]]


def run_once(
    key: str,
    spec: Mapping[str, Any],
    *,
    observe: Observe,
    initialise: Callable[[], Any],
    adopt: Callable[[], tuple[Any, Mapping[str, Any]]],
    join: Callable[[Any], Any],
    undo: Callable[[], None],
    reentrant: bool = False,
) -> Any:
    """Run ``initialise`` in exactly one of the concurrent callers; no lock is held meanwhile.

    Args:
        key: what is initialised: "world", "groups" …
        spec: the fields compared between callers.
        observe: the identity of the live object in this process right now, None if there is none.
        initialise: makes the state and returns what joiners are given.
        adopt: takes over state that somebody else made; returns what joiners are given, and the
            spec that the state really has.
        join: called with that by callers that reuse the state.
        undo: called when ``initialise`` or ``adopt`` raised; leaves nothing half-made.
        reentrant: SGLang's initialiser may ask for the same key again from within.

    Returns:
        What ``initialise``, ``adopt`` or ``join`` returned.

    Raises:
        SpecMismatch: the state exists, or is being made, for other values.
        StateInUse: equal state exists and this caller may not reuse it.
        AcquireTimeout, DeadlockError, PoisonedState: see ``errors``.
        Whatever ``initialise`` raised, to its own caller only: the next waiter leads.
    """
    while True:
        claim = _acquire(key, spec, observe=observe, reentrant=reentrant)
        if claim.decision == "nested":
            return initialise()
        if claim.decision == "join":
            result = join(claim.resource)
            _core.note_joined(key, claim.generation)
            return result
        try:
            if claim.decision == "lead":
                resource = initialise()
                claim.publish(identity=observe() or 0, resource=resource)
                _core.note_joined(key, claim.generation)
                return resource
            resource, actual = adopt()
            claim.publish(identity=observe() or 0, resource=resource, spec=dict(actual))
        except BaseException as error:
            # An interrupt may come after the publish: then others may use it already.
            if claim.pending:
                _undo(claim, undo, error)
            raise
        finally:
            event_log.report()
        # Adopted as what it really is: ask again, to join it or be told where it differs.


def _acquire(
    key: str, spec: Mapping[str, Any], *, observe: Observe, reentrant: bool
) -> _core.Claim:
    chosen = settings.current()
    request = _core.Request(
        key,
        dict(spec),
        runner=chosen.name,
        reuse=chosen.reuse,
        reentrant=reentrant,
        slow_after=chosen.slow_after,
    )
    return waiting.until(
        lambda: request.try_acquire(observe()), request, timeout=chosen.timeout, what=key
    )


def _undo(claim: _core.Claim, undo: Callable[[], None], error: BaseException) -> None:
    try:
        undo()
    except BaseException as second:
        claim.poison(f"{error!r}, and undoing it failed: {second!r}")
        raise
    claim.fail(repr(error))
