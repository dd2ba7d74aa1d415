"""torch.compiler: while one thread compiles, code that another runs eagerly is not told that it is compiled.

2.14 keeps it in a flag of the process; SGLang's layers compute in another way where it is set.
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
    # `is_compiling` reads it. The process's is still torch.export's.
    Raised("torch.compiler", "_is_compiling_flag", compile_flag.is_here),
    Around("torch.compiler", "_compile_session_context", _compile_session_context),
)
