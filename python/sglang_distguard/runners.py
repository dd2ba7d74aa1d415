"""A runner's handle: its name, its scope and its leases. Binding, entering and closing runners."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard import _core, default_dtype, settings
from sglang_distguard.groups import GROUPS, WORLD
from sglang_distguard.targets.expert_location import experts_key

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_ATTRIBUTE = "_sglang_distguard_handle"
_numbers = itertools.count(1)


def find_handle(runner: Any) -> Optional[_core.RunnerHandle]:
    """The handle of a runner built under the guard; None for any other object."""
    return getattr(runner, "__dict__", {}).get(_ATTRIBUTE)


def bind(runner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _core.RunnerHandle:
    """Give a runner that is about to be constructed the current scope, and leases on shared state.

    The leases end with ``close``, or when the runner is garbage-collected.
    """
    scope = _core.current_scope()
    name = settings.current().name or _default_name(args, kwargs)
    # What this scope joined and was torn down since is asked for, too: to be refused.
    keys = [key for key in (WORLD, GROUPS) if _core.is_ready(key) or _core.has_joined(key)]
    handle = _core.RunnerHandle(name, scope, keys)
    if scope is not None and _core.live_runners(scope) == 1:  # a draft is in its target's
        scope.label = name
    setattr(runner, _ATTRIBUTE, handle)
    return handle


def hold_experts(handle: _core.RunnerHandle) -> None:
    """Lease the scope's expert metadata, once the constructor has set it."""
    key = experts_key()
    if _core.is_ready(key):
        handle.hold(key)


@contextmanager
def activate(runner: ModelRunner) -> Iterator[ModelRunner]:
    """Enter ``runner``'s scope in the calling thread or asyncio task.

    A runner's own methods do this by themselves; code around them that reads SGLang's context
    (``get_server_args()``, ``ScheduleBatch``, ``ForwardBatch.init_new`` …) needs it.

    Args:
        runner: built while distguard was installed.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        DistGuardError: the runner was closed.
        LeaseBroken: what it was built on was torn down by force.
        ForkedError: the runner was built in the parent process.
    """
    token = handle_of(runner).enter()
    try:
        yield runner
    finally:
        leave(token)


def leave(token: Any) -> None:
    """Undo ``RunnerHandle.enter``; the thread's default dtype is torch's again outside of all."""
    if _core.leave(token) == 0:
        default_dtype.reset_thread()


@contextmanager
def closing(runner: ModelRunner) -> Iterator[ModelRunner]:
    """``close(runner)`` at the end of a with block, however that ends; as ``contextlib.closing``.

    Raises:
        TypeError: ``runner`` was not built under the guard.
    """
    handle = handle_of(runner)
    try:
        yield runner
    finally:
        handle.close()


def close(runner: ModelRunner) -> bool:
    """Release a runner's leases and the values of its scope; its methods raise from then on.

    Memory of weights and caches is freed when the last reference to the runner goes.

    Returns:
        True the first time, False when the runner was closed before.

    Raises:
        TypeError: ``runner`` was not built under the guard.
    """
    return handle_of(runner).close()


def handle_of(runner: object, argument: str = "runner") -> _core.RunnerHandle:
    """The handle of what a caller gave as ``argument``.

    Raises:
        TypeError: it was not built under the guard.
    """
    try:
        handle = find_handle(runner)
    except Exception:  # its ``__dict__`` is no dict, or raises
        handle = None
    if not isinstance(handle, _core.RunnerHandle):
        raise TypeError(
            f"{argument} must be a ModelRunner that was built under sglang_distguard, not a "
            f"{type(runner).__name__}; call sglang_distguard.install() before constructing it"
        )
    return handle


def _default_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    config = args[0] if args else kwargs.get("model_config")
    role = "-draft" if kwargs.get("is_draft_worker") else ""
    return f"{name_of_model(config)}{role}-{next(_numbers)}"


def name_of_model(config: object) -> str:
    """The last part of ``config.model_path`` as it may stand in a runner's name."""
    path = str(getattr(config, "model_path", "")).rstrip("/")
    name = "".join(letter if letter.isprintable() else "?" for letter in os.path.basename(path))
    return name.strip()[: settings.MAX_NAME // 2] or "runner"
