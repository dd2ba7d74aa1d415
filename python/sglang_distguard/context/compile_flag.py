"""Whether torch compiles on the calling thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


#: Whether the running code is inside of ``thread_compiles``; native, for layers ask in every forward.
is_here = _compiling.get


@contextmanager
def thread_compiles() -> Iterator[None]:
    """Let ``torch.compiler.is_compiling`` say so in the with block, on the calling thread only."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)
