"""Per-scope overlay over ``os.environ`` for SGLang's ``envs``.

0.5.23 passes decisions on in environment variables, which every later runner of the process reads.
Resolving ``ServerArgs`` (``handle_environment_variables``, ``model_overrides``) and constructors
write them. Here such a write stays in the scope, and a read there finds it before the process's
variable.

What resolving writes is also kept with the ``ServerArgs``, because SGLang resolves them only once,
and they may be published again, copied, or pickled.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard import _core

#: (text, or None when the variable was cleared; whether it was set to None, which SGLang
#: distinguishes from the text "None"). A plain tuple, because processes without the guard unpickle
#: it too.
Written = tuple[Optional[str], bool]
#: Variable -> what was written last.
Writes = dict[str, Written]

_ATTRIBUTE = "_sglang_distguard_environment"
#: Writes of the default scope; ``of_scope`` has those of the current scope.
_writes: Writes = {}
of_scope = _core.ScopedGlobal(globals(), "_writes", dict)


def find(name: str) -> Optional[Written]:
    """Return what the current scope has written to variable ``name``; None if nothing.

    Dynamo traces this function in forwards that read a variable.
    """
    return of_scope.value.get(name)


def is_own() -> bool:
    """Whether writes of the running code belong to a runner, not to the process."""
    execution = _core.current_execution()
    return execution is not None and execution.owns_environment


def write(name: str, written: Optional[Written]) -> None:
    """Record what the running code wrote to variable ``name``; None removes the record."""
    writes: Writes = of_scope.value
    if written is None:
        writes.pop(name, None)
    else:
        writes[name] = written


def resolve(server_args: Any) -> None:
    """Resolve ``server_args`` once, and give the current scope what resolving them has written."""
    of_scope.value = {}
    with _core.owning_environment():
        server_args.resolve_once()
    if of_scope.value:
        setattr(server_args, _ATTRIBUTE, dict(of_scope.value))
    else:
        adopt(_core.current_scope(), written_by(server_args))


def resolve_apart(resolve_once: Callable[[], None], server_args: Any) -> None:
    """Let ``resolve_once`` resolve ``server_args``, which is not published yet.

    What that writes goes with ``server_args`` to the scope where it is published.
    """
    with _core.in_scope(_core.new_scope("settings")), _core.owning_environment():
        resolve_once()
        written = dict(of_scope.value)
    if written:
        setattr(server_args, _ATTRIBUTE, written)


def written_by(server_args: Any) -> Writes:
    """Return a copy of what resolving ``server_args`` under the guard has written."""
    return dict(getattr(server_args, _ATTRIBUTE, {}))


def ask_scopes_first(field: Any) -> None:
    """Make reads of ``field``, which a scope has written, look in the current scope first.

    Other fields stay SGLang's own. The field object itself is changed, because a method of the
    class would make every read of every variable slower.
    """
    if "get" not in vars(field):
        field.get = functools.partial(_get, field, field.get)
        field.is_set = functools.partial(_is_set, field, field.is_set)


def unhook(environ: Any) -> None:
    """Undo ``ask_scopes_first`` for all fields of ``sglang.srt.environ``."""
    for field in vars(type(environ.envs)).values():
        if isinstance(field, environ.EnvField):
            vars(field).pop("get", None)
            vars(field).pop("is_set", None)


def _get(field: Any, original: Callable[[], Any]) -> Any:
    written = find(field.name)
    if written is None:
        return original()
    text, is_none = written
    if is_none:
        return None
    if text is None:
        return field._resolve_default()
    try:
        return field.parse(text)
    except ValueError as error:  # as the original does with the process's variable
        default = field._resolve_default()
        warnings.warn(
            f'Invalid value for {field.name}: {error}, using default "{default}"', stacklevel=2
        )
        return default


def _is_set(field: Any, original: Callable[[], bool]) -> bool:
    written = find(field.name)
    return bool(original()) if written is None else written[0] is not None


def adopt(scope: Optional[_core.Scope], writes: Writes) -> None:
    """Replace what ``scope`` has written by ``writes``."""
    fields = vars(sys.modules["sglang.srt.environ"])["envs"]
    for name in writes:
        ask_scopes_first(getattr(fields, name))
    of_scope.set_value_in(scope, dict(writes))


def hand_over(environ: Any) -> None:
    """Write what the default scope has into the process's environment, and end the overlay.

    Runners of the default scope read it there once the guard is uninstalled.

    Args:
        environ: ``sglang.srt.environ``.
    """
    unhook(environ)
    for name, (text, is_none) in dict(of_scope.value_in(None)).items():
        field = getattr(environ.envs, name)
        if text is None:
            field.clear()
        else:
            field.set(None if is_none else text)
    of_scope.set_value_in(None, {})
