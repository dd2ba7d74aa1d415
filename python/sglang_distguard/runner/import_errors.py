"""Errors of imports that failed, which modules of SGLang keep, and with them the importing frames.

SGLang imports optional packages with ``except ImportError as exc: _deepep_import_error = exc`` (0.5.23:
`layers/moe/token_dispatcher/deepep.py:66`, and others). The error's traceback refers to its frames,
each of those to its caller, and callers to their variables. The first such import of a process
happens while its first runner is built, so that this runner would never be freed.
"""

from __future__ import annotations

import sys

from sglang_distguard.errors import with_causes

_PACKAGE = "sglang."


def drop_tracebacks() -> None:
    """Take the tracebacks from the errors that global names of SGLang's modules refer to.

    The errors themselves and their messages stay. This takes about 10 ms.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(_PACKAGE):
            for value in list(getattr(module, "__dict__", {}).values()):
                if issubclass(type(value), BaseException):
                    for error in with_causes(value):
                        error.__traceback__ = None
