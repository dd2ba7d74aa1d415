"""The handle of a runner: its name, its scope and its leases; and that of a manager.

A manager is a Scheduler, TokenizerManager or DetokenizerManager of SGLang. It lives in a scope as a
runner does, and has no leases.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.config.naming import name_of_model
from sglang_distguard.distributed import owned_groups, process_settings, world
from sglang_distguard.distributed.keys import GROUPS, PROCESS, WORLD, experts_key, own_key
from sglang_distguard.distributed.ranks import agreement
from sglang_distguard.errors import (
    DistGuardError,
    RunnerClosed,
)
from sglang_distguard.runner.collective_steps import may_overlap
from sglang_distguard.runner.import_errors import drop_tracebacks

_ATTRIBUTE = "_sglang_distguard_handle"
_numbers = itertools.count(1)


def find_handle(runner: Any) -> Optional[_core.RunnerHandle]:
    """Return the handle of a runner or manager built under the guard; None for other objects."""
    return getattr(runner, "__dict__", {}).get(_ATTRIBUTE)


def bind(runner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _core.RunnerHandle:
    """Give a runner that is about to be constructed the current scope, and leases on shared state.

    The leases end with ``close``, or when the runner is garbage-collected.

    Args:
        runner: the object before its constructor runs.
        args, kwargs: arguments of its constructor.
    """
    scope = _core.current_scope()
    ask = agreement.asked()
    name = settings.current().name or (ask.name if ask else None) or _default_name(args, kwargs)
    own = own_key(scope)
    used = own if _core.has_joined(own) else GROUPS
    # A key that this scope joined and that was torn down since is included, so that it is refused.
    keys = [key for key in (WORLD, PROCESS, used) if _core.is_ready(key) or _core.has_joined(key)]
    turns = None if ask is None or may_overlap(used) else ask.known_as
    handle = _handle(name, scope, keys, turns)
    if scope is not None and _core.live_runners(scope) == 1:  # a draft shares its target's scope
        scope.label = name
    execution = _core.current_execution()
    if execution is not None and execution.runner is not None and execution.runner.manager:
        execution.runner.keep_runner(handle)
    setattr(runner, _ATTRIBUTE, handle)
    return handle


def bind_manager(manager: Any, classname: str, server_args: Any) -> _core.RunnerHandle:
    """Give a manager that is about to be constructed the current scope.

    Args:
        manager: the object before its constructor runs.
        classname: name of its class in SGLang.
        server_args: argument of its constructor.
    """
    scope = _core.current_scope()
    default = f"{name_of_model(server_args)}-{classname}-{next(_numbers)}"
    name = settings.current().name or default
    handle = _core.RunnerHandle(name, scope, [], manager=classname)
    if scope is not None and _core.live_residents(scope) == 1:
        scope.label = name
    setattr(manager, _ATTRIBUTE, handle)
    return handle


def _handle(
    name: str, scope: Optional[_core.Scope], keys: list[str], turns: Optional[str]
) -> _core.RunnerHandle:
    deadline = time.monotonic() + settings.current().timeout
    while True:
        try:
            return _core.RunnerHandle(
                name, scope, keys, turns=turns, ranks=world.ranks() is not None
            )
        except DistGuardError as error:
            if type(error) is not DistGuardError or error.details.get("key") != PROCESS:
                raise
            if time.monotonic() > deadline:
                raise
        # Since `agree` no runner has held the settings, and another thread has asked for more.
        process_settings.agree()


def hold_experts(handle: _core.RunnerHandle) -> None:
    """Lease the scope's expert metadata, once the constructor has set it."""
    key = experts_key()
    if _core.is_ready(key):
        handle.hold(key)


def release(handle: _core.RunnerHandle) -> bool:
    """Release what ``handle`` holds, at once; return False when that was done before."""
    scope = handle.scope
    closed = handle.close()
    if closed:
        if handle.manager is None:  # a manager's are ended with it (``hooks.endings``)
            for end in reversed(handle.take_parts()):
                end()
        owned_groups.destroy_if_vacant(scope)
        drop_tracebacks()
    return closed


def release_failed(runner: Any) -> None:
    """Release the leases of a runner whose construction failed, and clear its attributes.

    The error's frames refer to the runner, which would keep its weights alive (46 GB were seen).
    """
    handle = find_handle(runner)
    if handle is not None:
        release(handle)
    vars(runner).clear()
    if handle is not None:
        _core.end_budget(handle)


def clear_closed(resident: Any) -> None:
    """Clear the attributes of a closed runner or manager, which keep memory.

    It is still known as closed, also to a thread that calls a method or reads an attribute meanwhile.
    What was promised to it, or to the runners of the manager, may be promised to others from then on.
    """
    handle = find_handle(resident)
    if handle is not None and handle.manager is None:
        resident.__class__ = _closed_form(type(resident))
    fields = vars(resident)
    for name in [it for it in fields if it != _ATTRIBUTE]:
        fields.pop(name, None)
    if handle is not None:
        for it in (handle, *handle.runners):
            _core.end_budget(it)


def _closed_form(kind: type) -> type:
    """A subclass of ``kind`` whose objects say that they are closed where an attribute is missing."""

    def __getattr__(self: Any, name: str) -> Any:
        handle = find_handle(self)
        named = "" if handle is None else f" '{handle.name}'"
        raise RunnerClosed(
            f"the {kind.__name__}{named} is closed and has no {name!r} any more; read what is needed of "
            "it before close()",
            runner=None if handle is None else handle.name,
        )

    fields = {"__getattr__": __getattr__, "__module__": kind.__module__, "__slots__": ()}
    return type(kind.__name__, (kind,), fields)


def mark_as_of(runner: Any, part: Any) -> None:
    """Record on ``part``, which ``runner``'s methods have made, that it belongs to ``runner``.

    A part that another runner has made keeps its owner.
    """
    fields = getattr(part, "__dict__", None)
    if fields is not None and _ATTRIBUTE not in fields:
        setattr(part, _ATTRIBUTE, find_handle(runner))


def handle_of(runner: object, argument: str = "runner") -> _core.RunnerHandle:
    """Return the handle of ``runner``, which a caller passed as ``argument``.

    Raises:
        TypeError: ``runner`` is no runner that was built under the guard.
    """
    handle = handle_of_any(runner)
    if handle is None or handle.manager is not None:
        raise TypeError(
            f"{argument} must be a ModelRunner that was built under sglang_distguard, not a "
            f"{type(runner).__name__}; call sglang_distguard.install() before constructing it"
        )
    return handle


def handle_of_any(resident: object) -> Optional[_core.RunnerHandle]:
    """Return the handle of ``resident``, any object that a caller passed; None if it has none."""
    try:
        handle = find_handle(resident)
    except Exception:  # its ``__dict__`` is not a dict, or raises
        return None
    return handle if isinstance(handle, _core.RunnerHandle) else None


def _default_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    config = args[0] if args else kwargs.get("model_config")
    role = "-draft" if kwargs.get("is_draft_worker") else ""
    return f"{name_of_model(config)}{role}-{next(_numbers)}"
