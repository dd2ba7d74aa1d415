"""Groups that one runner owns, in a world of several ranks: until when, and who destroys them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from sglang_distguard import _core, groups, settings, world
from sglang_distguard.errors import StateInUse
from sglang_distguard.scoping import scope_active
from sglang_distguard.teardowns import forced, tearing_down


def release(scope: Optional[_core.Scope]) -> None:
    """The runners of ``scope`` are gone, unless one of them lives: destroy what they own.

    gloo closes its connections then, so that whoever waits for this rank in a collective of that
    runner on another rank gets an error instead (torch 2.14.1; not so NCCL).
    """
    if _core.live_runners(scope) == 0:
        discard(groups.own_key(scope), scope)
        if world.ranks() is not None:
            with scope_active(scope):
                groups.unstamp()


def collect() -> None:
    """Destroy what runners owned that were collected without ``close``: destructors run no Python."""
    # The keys first: what another thread makes between the two has a living scope.
    keys = groups.all_keys()
    alive = {groups.own_key(scope) for scope in (None, *_core.live_scopes())}
    for key in keys:
        if key != groups.GROUPS and key not in alive:
            _destroy(key, groups.destroy)


def discard(key: str, scope: Optional[_core.Scope]) -> None:
    """Destroy the groups under ``key``, which ``scope`` has made, unless somebody leases them."""

    def unset(made: groups.Groups) -> None:
        with scope_active(scope):
            groups.discard(made)

    _destroy(key, unset)


def break_communicators(handle: _core.RunnerHandle) -> None:
    """Destroy what ``handle``'s runner computes over: this rank has left a step half-done.

    The next collective here would meet one of that step on another rank. Whoever waits there for
    this rank hears at once (``groups.sever``), and every runner that uses the same communicators
    raises LeaseBroken from now on.
    """
    key = groups.key_in_use(handle.scope)

    def end(made: groups.Groups) -> None:
        groups.sever(made)
        groups.destroy(made)

    with settings.runner_scope(handle.name), forced():
        _destroy(key, end)


def _destroy(key: str, destroy: Callable[[groups.Groups], None]) -> None:
    made: Optional[groups.Groups] = _core.resource(key)
    if made is None:
        return
    try:
        with tearing_down(key) as (state,):
            if state.origin != "adopted":  # somebody else's are let go
                destroy(made)
    except (
        StateInUse
    ):  # a runner that is being built took a lease meanwhile, or it is going already
        return
