"""torch.compiler: while one thread compiles, code that another runs eagerly is not told that it is compiled.

2.14 keeps it in a flag of the process; SGLang's layers compute in another way where it is set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard import compiling
from sglang_distguard.patching import Around


def _is_compiling(original: Callable[..., Any]) -> Callable[..., Any]:
    is_here = compiling.is_here

    @functools.wraps(original)
    def is_compiling() -> bool:
        return is_here() or bool(original())  # the flag is still torch.export's

    return is_compiling


def _compile_session_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compile_session_context() -> Iterator[None]:
        with compiling.thread_compiles():
            yield

    return _compile_session_context


CHANGES = (
    Around("torch.compiler", "is_compiling", _is_compiling),
    Around("torch.compiler", "_compile_session_context", _compile_session_context),
)
