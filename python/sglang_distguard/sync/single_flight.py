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
        key: registry key of the state: "world", "groups" …
        spec: the fields compared between callers.
        observe: returns the identity of the live object in this process; None if there is none.
        initialise: makes the state and returns the resource that joiners are given.
        adopt: takes over state that user code has made; returns the resource that joiners are
            given, and the actual spec of the state.
        join: called with the resource by callers that reuse the state.
        undo: called when ``initialise`` or ``adopt`` has raised; leaves nothing half-made.
        reentrant: whether SGLang's initialiser may request the same key again from within.

    Returns:
        What ``initialise``, ``adopt`` or ``join`` returned.

    Raises:
        SpecMismatch: the state exists, or is being made, for other values.
        StateInUse: equal state exists and the settings do not allow this caller to reuse it.
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
            # After an interrupt that follows the publish, others may use the state already.
            if claim.pending:
                _undo(claim, undo, error)
            raise
        finally:
            event_log.report()
        # Adopted with its actual spec. Ask again: join it, or raise where it differs.


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
