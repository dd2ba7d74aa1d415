"""What a configuration or a runner writes into the environment through SGLang's ``envs``: its scope's own.

0.5.23 hands decisions on in environment variables, which every later runner of the process reads:
resolving ``ServerArgs`` (``handle_environment_variables``, ``model_overrides``) and constructors write
them. Here such a write stays in the scope; a read there finds it before the process's variable.

What resolving writes is kept with the ``ServerArgs`` as well: SGLang resolves them once, and they may
be published again, copied, or pickled.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard import _core

#: (text, or None when the variable was cleared; whether it was set to None, which SGLang keeps apart
#: from the text "None"). A plain tuple: processes without distguard unpickle it, too.
Written = tuple[Optional[str], bool]
#: Variable -> what was written last.
Writes = dict[str, Written]

_ATTRIBUTE = "_sglang_distguard_environment"
#: The default scope's; ``of_scope`` answers for the others.
_writes: Writes = {}
of_scope = _core.ScopedGlobal(globals(), "_writes", dict)


def find(name: str) -> Optional[Written]:
    """What the running code finds in place of the process's variable; None: the process's.

    Dynamo traces it, in forwards that read a variable.
    """
    return of_scope.value.get(name)


def is_own() -> bool:
    """Whether what the running code writes is a runner's, not the process's."""
    execution = _core.current_execution()
    return execution is not None and execution.owns_environment


def write(name: str, written: Optional[Written]) -> None:
    """Note what the running code wrote; None: as if it never had."""
    writes: Writes = of_scope.value
    if written is None:
        writes.pop(name, None)
    else:
        writes[name] = written


def resolve(server_args: Any) -> None:
    """Resolve ``server_args`` unless they are; the current scope has then what they have written."""
    of_scope.value = {}
    with _core.owning_environment():
        server_args.resolve_once()
    if of_scope.value:
        setattr(server_args, _ATTRIBUTE, dict(of_scope.value))
    else:
        adopt(_core.current_scope(), written_by(server_args))


def written_by(server_args: Any) -> Writes:
    """What resolving ``server_args`` under the guard has written; a copy."""
    return dict(getattr(server_args, _ATTRIBUTE, {}))


def ask_scopes_first(field: Any) -> None:
    """Let ``field``, which a scope has written, be asked for there; the others stay SGLang's own.

    On the field itself: a class's method would make every reading of every variable slower.
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
    """Make ``writes`` what ``scope`` has written."""
    fields = vars(sys.modules["sglang.srt.environ"])["envs"]
    for name in writes:
        ask_scopes_first(getattr(fields, name))
    of_scope.set_value_in(scope, dict(writes))


def hand_over(environ: Any) -> None:
    """Give the process what the default scope has: where its runner looks once the guard is out.

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
