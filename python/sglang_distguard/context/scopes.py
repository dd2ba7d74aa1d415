"""Access to the scoped globals of patched SGLang modules, and to the scope of a context."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import environment
from sglang_distguard.errors import AmbiguousBuild, NotSupported
from sglang_distguard.patching.syntax import accessor_name

CONTEXT_MODULE = "sglang.srt.runtime_context"


def find_accessor(module: str, name: str) -> Optional[_core.ScopedGlobal]:
    """Return the accessor of ``module.name``; None if the module is not imported or not patched."""
    namespace = getattr(sys.modules.get(module), "__dict__", {})
    found: Optional[_core.ScopedGlobal] = namespace.get(accessor_name(name))
    return found


def accessor(module: str, name: str) -> _core.ScopedGlobal:
    """Return the accessor of ``module.name``.

    Raises:
        NotSupported: the module is not imported or not patched.
    """
    found = find_accessor(module, name)
    if found is None:
        raise NotSupported(
            f"{module}.{name} is not guarded: call sglang_distguard.install() first", module=module
        )
    return found


def context_snapshot() -> dict[str, Any]:
    """Return SGLang's `snapshot_context` of the current scope, for its `restore_context`.

    The stamp is copied, because 0.5.23 keeps the stamp itself and writes into it afterwards.
    """
    snapshot = vars(sys.modules[CONTEXT_MODULE])["snapshot_context"]()
    parallel = snapshot.get("__parallel__", {})
    if "_stamp" in parallel:
        parallel["_stamp"] = dict(parallel["_stamp"])
    return snapshot


def scope_active(scope: Optional[_core.Scope]) -> AbstractContextManager[None]:
    """Make ``scope`` current in the calling thread or task for a with block."""
    return _core.in_scope(scope)


def scope_of_context(context: Any) -> Optional[_core.Scope]:
    """Return the scope whose RuntimeContext is ``context``; None for SGLang's default scope.

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
    environment.adopt(scope, environment.written_by(context._server_args))
    return scope


class _Keeps:
    """Keeps a scope alive through the ``ServerArgs`` published there; copies of it are None."""

    def __init__(self, scope: Optional[_core.Scope]) -> None:
        self._scope = scope

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # Processes without the guard unpickle it too.
        return type(None), ()

    def __copy__(self) -> None:
        return None

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        return None


_KEPT = "_sglang_distguard_scope"


def keep_published(server_args: Any) -> None:
    """Keep the current scope alive as long as ``server_args``, which were just published there.

    The task or thread that published may end long before another one builds the runner.
    """
    setattr(server_args, _KEPT, _Keeps(_core.current_scope()))


def keep_pending(scope: _core.Scope) -> None:
    """Do ``keep_published`` for ``scope``, into which a publish in another scope was moved."""
    server_args = accessor(CONTEXT_MODULE, "_CONTEXT").value_in(scope)._server_args
    if server_args is not None:
        setattr(server_args, _KEPT, _Keeps(scope))


def scopes_of_published(server_args: Any) -> list[Optional[_core.Scope]]:
    """Return the scopes whose last publish was ``server_args``, the same object."""
    contexts = accessor(CONTEXT_MODULE, "_CONTEXT")
    return [
        scope
        for scope in (None, *_core.live_scopes())
        if scope is None or contexts.is_set_in(scope)
        if contexts.value_in(scope)._server_args is server_args
    ]


def of_published(server_args: Any) -> AbstractContextManager[object]:
    """Run a with block in the scope where ``server_args`` was published.

    The object decides before any context, because stages of a start-up may run in separate tasks,
    threads or pools. If it was never published, nothing is done and SGLang raises its own error.

    Raises:
        AmbiguousBuild: it was published more than once, and never by the running code.
    """
    if server_args is None:
        return nullcontext()
    here = _core.current_scope()
    found = scopes_of_published(server_args)
    if here in found and (here is not None or _core.current_execution() is not None):
        return nullcontext()
    # Prefer scopes without a living runner: a runner is still to be built there.
    open_ones = [scope for scope in found if not _core.live_runners(scope)] or found
    if not open_ones:
        return nullcontext()
    if len(open_ones) > 1:
        labels = sorted("(default)" if scope is None else scope.label for scope in open_ones)
        raise AmbiguousBuild(
            f"this ServerArgs object was published {len(open_ones)} times ({', '.join(labels)}), "
            "but not by the running thread or task, so it does not identify one runner. Publish a "
            "separate copy for each runner (copy.copy), or build in the thread that published",
            scopes=labels,
        )
    return _core.resuming(open_ones[0])
