"""Groups that one runner owns in a world of several ranks: when and how they are destroyed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.distributed import coordinators, world
from sglang_distguard.distributed.keys import GROUPS, all_keys, key_in_use, own_key
from sglang_distguard.distributed.teardown import forced, tearing_down
from sglang_distguard.errors import DistGuardError, LeaseBroken, StateInUse


def destroy_if_vacant(scope: Optional[_core.Scope]) -> None:
    """Destroy the groups of ``scope``, unless a runner lives there or is about to be built."""
    if world.ranks() is None:
        return
    with _core.Vacancy(scope) as is_vacant:
        if is_vacant:
            destroy_of(scope)


def destroy_of(scope: Optional[_core.Scope]) -> None:
    """Destroy the groups that ``scope`` owns, so that it may be given other widths.

    The calling thread must have claimed ``scope``.
    """
    if world.ranks() is None:
        return
    with scope_active(scope):
        stamped = coordinators.read()["_TP"]
        destroy_unless_leased(own_key(scope), scope)
        # Groups that user code made and that are not adopted yet stay.
        if stamped is not None and (_is_shared(stamped) or not coordinators.is_alive(stamped)):
            coordinators.unset()


def _is_shared(tensor_parallel: object) -> bool:
    shared: Optional[coordinators.Groups] = _core.resource(GROUPS)
    return shared is not None and shared["_TP"] is tensor_parallel


def destroy_orphaned() -> None:
    """Destroy the groups of runners that were collected without ``close``.

    Destructors run no Python, so they cannot destroy the groups themselves.
    """
    # Read the keys first. In the other order, groups that another thread makes in between would
    # seem to have no living scope.
    keys = all_keys()
    alive = {own_key(scope) for scope in (None, *_core.live_scopes())}
    for key in keys:
        if key != GROUPS and key not in alive:
            _destroy(key, coordinators.destroy)


def destroy_unless_leased(key: str, scope: Optional[_core.Scope]) -> None:
    """Destroy the groups under ``key``, which ``scope`` has made, unless a runner leases them."""

    def unset(made: coordinators.Groups) -> None:
        with scope_active(scope):
            coordinators.destroy_and_unset(made)

    _destroy(key, unset)


def destroy_communicators(handle: _core.RunnerHandle, why: str) -> None:
    """Destroy the communicators of ``handle``'s runner, because this rank left a step half-done.

    The next collective here would meet one of that step on another rank. Ranks that wait for this
    rank get an error at once (``coordinators.disconnect``). Every runner that uses the same
    communicators raises LeaseBroken from now on, which says ``why``.
    """
    try:
        handle.check()
    except LeaseBroken:  # they are destroyed already; present communicators are others
        return
    except DistGuardError:  # the runner was closed meanwhile
        pass
    with settings.runner_scope(handle.name), forced(why=why):
        _destroy(key_in_use(handle.scope), coordinators.destroy, disconnect=True)


def _destroy(
    key: str, destroy: Callable[[coordinators.Groups], None], *, disconnect: bool = False
) -> None:
    made: Optional[coordinators.Groups] = _core.resource(key)
    if made is None:
        return
    try:
        with tearing_down(key) as (state,), coordinators.on_their_device(made):
            if disconnect:
                coordinators.disconnect(made)
            if state.origin != "adopted":  # user code's groups are only forgotten
                destroy(made)
    except StateInUse:  # a runner being built took a lease, or another thread tears it down
        return
