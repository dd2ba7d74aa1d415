"""torch.compiler: `is_compiling` is true only on the thread that compiles.

torch 2.14 keeps it in a flag of the process. SGLang's layers compute differently where the flag is
set, so code that another thread runs eagerly meanwhile must not see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard.context import compile_flag
from sglang_distguard.patching import Around, Raised


def _compile_session_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _compile_session_context() -> Iterator[None]:
        with compile_flag.thread_compiles():
            yield

    return _compile_session_context


CHANGES = (
    # `is_compiling` reads it. torch.export still uses the flag of the process.
    Raised("torch.compiler", "_is_compiling_flag", compile_flag.is_here),
    Around("torch.compiler", "_compile_session_context", _compile_session_context),
)
