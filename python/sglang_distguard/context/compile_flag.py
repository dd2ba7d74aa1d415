"""Whether torch compiles on the calling thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


#: Whether the running code is in ``thread_compiles``; native, because layers ask in every forward.
is_here = _compiling.get


@contextmanager
def thread_compiles() -> Iterator[None]:
    """Make ``torch.compiler.is_compiling`` true in the with block, on the calling thread only."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)
