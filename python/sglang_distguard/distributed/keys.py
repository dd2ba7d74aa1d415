"""The registry's keys: world, groups, process settings, and each scope's expert metadata."""

from __future__ import annotations

from typing import Optional

from sglang_distguard import _core

#: Registry keys of state that the process shares.
WORLD = "world"
GROUPS = "groups"
PROCESS = "process"


def own_key(scope: Optional[_core.Scope]) -> str:
    """Return the registry key of the groups that ``scope`` owns in a world of several ranks."""
    return _of_scope(GROUPS, scope)


def key_in_use(scope: Optional[_core.Scope]) -> str:
    """Return the registry key of the groups that ``scope`` uses: its own, else the shared ones."""
    own = own_key(scope)
    return own if _core.is_ready(own) else GROUPS


def all_keys() -> tuple[str, ...]:
    """Return the registry keys of all groups; the key of the shared groups is always included."""
    owned = (key for key in _core.ready_keys() if key.startswith(f"{GROUPS}:"))
    return (GROUPS, *sorted(owned))


def experts_key() -> str:
    """Return the registry key of the current scope's expert metadata."""
    return _of_scope("experts", _core.current_scope())


def _of_scope(kind: str, scope: Optional[_core.Scope]) -> str:
    return f"{kind}:{0 if scope is None else scope.id}"
