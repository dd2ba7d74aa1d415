"""Groups that one runner owns, in a world of several ranks: until when, and who destroys them."""

from __future__ import annotations

from typing import Any, Optional

from sglang_distguard import _core, groups
from sglang_distguard.errors import StateInUse
from sglang_distguard.scoping import scope_active
from sglang_distguard.teardowns import tearing_down


def release(scope: Optional[_core.Scope]) -> None:
    """Destroy what the runners of ``scope`` own, unless one of them lives.

    gloo closes its connections then, so that whoever waits for this rank in a collective of that
    runner on another rank gets an error instead (torch 2.14.1; not so NCCL).
    """
    if _core.live_runners(scope) == 0:
        _discard(groups.own_key(scope), scope)


def collect() -> None:
    """Destroy what runners owned that were collected without ``close``: destructors run no Python."""
    alive = {groups.own_key(scope) for scope in (None, *_core.live_scopes())}
    for key in groups.all_keys():
        if key != groups.GROUPS and key not in alive:
            _discard(key, None)


def _discard(key: str, scope: Optional[_core.Scope]) -> None:
    owned: Optional[dict[str, Any]] = _core.resource(key)
    if owned is None:
        return
    try:
        with tearing_down(key):
            if key == groups.own_key(scope):
                with scope_active(scope):
                    groups.discard(owned)
            else:
                groups.destroy(owned)
    except StateInUse:  # a runner that is being built took a lease meanwhile
        return
