"""Errors of imports that failed, which modules of SGLang keep, and with them the importing frames.

SGLang imports optional packages with ``except ImportError as exc: _deepep_import_error = exc`` (0.5.23:
`layers/moe/token_dispatcher/deepep.py:66`, and others). The error's traceback refers to its frames,
each of those to its caller, and callers to their variables. The first such import of a process
happens while its first runner is built, so that this runner would never be freed.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

from sglang_distguard.errors import with_causes

_PACKAGE = "sglang."
#: The specification with which each module was executed when it was last looked at. A module that is
#: executed again, by `importlib.reload` or after it was removed from `sys.modules`, has another one.
_looked_at: dict[str, ModuleSpec] = {}
#: How many modules there were then, and the specification of the last one.
_seen: tuple[int, object] = (0, None)


def drop_tracebacks() -> None:
    """Take the tracebacks from the errors that global names of SGLang's modules refer to.

    The errors themselves and their messages stay. A module is looked at once it has been executed,
    and not again: SGLang 0.5.23 keeps such errors only while a module is executed
    (`tests/test_import_errors.py` reads the text of the installed release). A look at all of them
    holds the interpreter's lock for 10 ms, in which no other engine computes. A module that was
    reloaded is noticed with the next import.
    """
    global _seen
    last = sys.modules.get(next(reversed(sys.modules)))
    seen = (len(sys.modules), getattr(last, "__spec__", None))
    if seen[0] == _seen[0] and seen[1] is _seen[1]:  # equal specifications may be two
        return
    complete = True
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            spec = getattr(module, "__spec__", None)
            if spec is not None and _looked_at.get(name) is spec:
                continue
            _drop_in(module)
            if spec is None or getattr(spec, "_initializing", False):
                complete = False
            else:
                _looked_at[name] = spec
    if complete:
        _seen = seen


def _drop_in(module: object) -> None:
    for value in list(getattr(module, "__dict__", {}).values()):
        if issubclass(type(value), BaseException):
            for error in with_causes(value):
                error.__traceback__ = None
