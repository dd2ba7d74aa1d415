"""Reaches the scoped globals of patched SGLang modules, and finds the scope of a context."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from sglang_distguard import _core, environment
from sglang_distguard.errors import NotSupported
from sglang_distguard.patching.syntax import accessor_name

CONTEXT_MODULE = "sglang.srt.runtime_context"


def accessor(module: str, name: str) -> _core.ScopedGlobal:
    """The accessor of ``module``.``name``.

    Raises:
        NotSupported: the module is not imported or not patched.
    """
    namespace = getattr(sys.modules.get(module), "__dict__", {})
    found = namespace.get(accessor_name(name))
    if found is None:
        raise NotSupported(
            f"{module}.{name} is not guarded: call sglang_distguard.install() first", module=module
        )
    return found


def context_snapshot() -> dict[str, Any]:
    """SGLang's own `snapshot_context` of the current scope, for its `restore_context`.

    0.5.23 keeps the stamp itself, not a copy, and writes into it afterwards.
    """
    snapshot = vars(sys.modules[CONTEXT_MODULE])["snapshot_context"]()
    parallel = snapshot.get("__parallel__", {})
    if "_stamp" in parallel:
        parallel["_stamp"] = dict(parallel["_stamp"])
    return snapshot


@contextmanager
def scope_active(scope: Optional[_core.Scope]) -> Iterator[None]:
    """Make ``scope`` current in the calling thread or task for a with block."""
    token = _core.switch(scope)
    try:
        yield
    finally:
        _core.switch_back(token)


def scope_of_context(context: Any) -> Optional[_core.Scope]:
    """The scope whose RuntimeContext is ``context``; None for SGLang's default one.

    A context that no scope has yet (made by ``create_context``) gets a new scope.
    """
    contexts = accessor(CONTEXT_MODULE, "_CONTEXT")
    if contexts.value_in(None) is context:
        return None
    for scope in _core.live_scopes():
        if contexts.is_set_in(scope) and contexts.value_in(scope) is context:
            return scope
    scope = _core.new_scope(f"context-{id(context):x}")
    contexts.set_value_in(scope, context)
    accessor(CONTEXT_MODULE, "_PARALLEL").set_value_in(scope, context.parallel)
    environment.of_scope.set_value_in(scope, environment.written_by(context._server_args))
    return scope
