"""A way to register parameters of torch modules that belongs to one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

RegisterParameter = Callable[..., Any]

_override: ContextVar[Optional[RegisterParameter]] = ContextVar("register_parameter", default=None)


def of_thread() -> Optional[RegisterParameter]:
    """What the calling thread calls for ``Module.register_parameter``; None for torch's own."""
    return _override.get()


@contextmanager
def thread_register_parameter(function: Optional[RegisterParameter]) -> Iterator[None]:
    """Make ``Module.register_parameter`` ``function`` for the calling thread inside the with block."""
    token = _override.set(function)
    try:
        yield
    finally:
        _override.reset(token)
