"""What a configuration or a runner writes into the environment through SGLang's ``envs``: its scope's own.

0.5.23 hands decisions on in environment variables, which every later runner of the process reads:
resolving ``ServerArgs`` (``handle_environment_variables``, ``model_overrides``) and constructors write
them. Here such a write stays in the scope; a read there finds it before the process's variable.

What resolving writes is kept with the ``ServerArgs`` as well: SGLang resolves them once, and they may
be published again, copied, or pickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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
_for_runner: ContextVar[bool] = ContextVar("for_runner", default=False)


def find(name: str) -> Optional[Written]:
    """What the running code finds in place of the process's variable; None: the process's.

    Dynamo traces it, in forwards that read a variable.
    """
    return of_scope.value.get(name)


def is_own() -> bool:
    """Whether what the running code writes is a runner's, not the process's."""
    return _core.current_scope() is not None or _core.depth() > 0 or _for_runner.get()


@contextmanager
def for_runner() -> Iterator[None]:
    """What the with block writes in SGLang's default scope, too, is that of the runner there."""
    token = _for_runner.set(True)
    try:
        yield
    finally:
        _for_runner.reset(token)


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
    with for_runner():
        server_args.resolve_once()
    if of_scope.value:
        setattr(server_args, _ATTRIBUTE, dict(of_scope.value))
    else:
        of_scope.value = written_by(server_args)


def written_by(server_args: Any) -> Writes:
    """What resolving ``server_args`` under the guard has written; a copy."""
    return dict(getattr(server_args, _ATTRIBUTE, {}))


def hand_over(environ: Any) -> None:
    """Give the process what the default scope has: where its runner looks once the guard is out.

    Args:
        environ: ``sglang.srt.environ``.
    """
    for name, (text, is_none) in dict(of_scope.value_in(None)).items():
        field = getattr(environ.envs, name)
        if text is None:
            field.clear()
        else:
            field.set(None if is_none else text)
    of_scope.set_value_in(None, {})
