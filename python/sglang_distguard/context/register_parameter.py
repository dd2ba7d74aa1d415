"""A per-thread override of torch's ``Module.register_parameter``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

RegisterParameter = Callable[..., Any]

_override: ContextVar[Optional[RegisterParameter]] = ContextVar("register_parameter", default=None)


def of_thread() -> Optional[RegisterParameter]:
    """Return the calling thread's ``Module.register_parameter``; None for torch's own."""
    return _override.get()


@contextmanager
def thread_register_parameter(function: Optional[RegisterParameter]) -> Iterator[None]:
    """Override ``Module.register_parameter`` on the calling thread in the with block.

    Args:
        function: the override; None for torch's own.
    """
    token = _override.set(function)
    try:
        yield
    finally:
        _override.reset(token)
