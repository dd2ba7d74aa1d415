"""The scope of a publish, and of the code that it belongs to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import generation
from sglang_distguard.errors import AmbiguousBuild


def scope_active(scope: Optional[_core.Scope]) -> AbstractContextManager[None]:
    """Make ``scope`` current in the calling thread or task for a with block."""
    return _core.in_scope(scope)


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
    server_args = generation.current().published_in(scope)
    if server_args is not None:
        setattr(server_args, _KEPT, _Keeps(scope))


def scopes_of_published(server_args: Any) -> list[Optional[_core.Scope]]:
    """Return the scopes whose last publish was ``server_args``, the same object."""
    published_in = generation.current().published_in
    return [scope for scope in (None, *_core.live_scopes()) if published_in(scope) is server_args]


def of_published(server_args: Any) -> AbstractContextManager[object]:
    """Run a with block in the scope where ``server_args`` was published.

    The object decides before any context, because stages of a start-up may run in separate tasks,
    threads or pools. If it was never published, nothing is done and SGLang raises its own error.

    Raises:
        AmbiguousBuild: it was published more than once, and never by the running code.
    """
    if server_args is None:
        return nullcontext()
    while True:
        scope, is_found = _where_to_build(server_args)
        if not is_found:
            return nullcontext()
        resumed = _core.resuming(scope)
        # A pending configuration is claimed now: no publish of another thread puts it aside.
        if generation.current().published_in(scope) is server_args:
            return resumed


def _where_to_build(server_args: Any) -> tuple[Optional[_core.Scope], bool]:
    """Return the scope where ``server_args`` was published, and whether there is another one than here.

    Raises:
        AmbiguousBuild: see ``of_published``.
    """
    here = _core.current_scope()
    found = scopes_of_published(server_args)
    if here in found and (here is not None or _core.current_execution() is not None):
        return here, False
    # Prefer scopes without a resident: a runner or manager is still to be built there.
    open_ones = [scope for scope in found if not _core.live_residents(scope)] or found
    if not open_ones:
        return None, False
    if len(open_ones) > 1:
        labels = sorted("(default)" if scope is None else scope.label for scope in open_ones)
        raise AmbiguousBuild(
            f"this ServerArgs object was published {len(open_ones)} times ({', '.join(labels)}), "
            "but not by the running thread or task, so it does not identify one runner. Publish a "
            "separate copy for each runner (copy.copy), or build in the thread that published",
            scopes=labels,
        )
    return open_ones[0], True
