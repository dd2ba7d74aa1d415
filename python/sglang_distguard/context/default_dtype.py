"""A default dtype of torch that belongs to one execution.

`torch.set_default_dtype` is process-wide (a C++ static, torch 2.14), and SGLang keeps it set for
the whole weight load. Here the running execution carries the dtype (rust/src/execution.rs). A
TorchFunctionMode, which torch keeps per thread, gives it to functions that would use the process's
default. The mode holds no state: code whose execution carries no dtype, such as another asyncio
task of the thread, passes through it. The mode is removed when no execution needs it
(rust/src/dtype.rs).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard import _core

if TYPE_CHECKING:
    import torch


def is_traced() -> bool:
    """Whether Dynamo is tracing the calling code; traced code has True for this call.

    `torch.compiler.is_compiling` would be wrong here. It is one flag of the process (torch 2.14.1),
    and is true for a thread that loads a model while another thread compiles.
    """
    torch = sys.modules["torch"]
    return bool(torch.compiler.is_dynamo_compiling())


def in_force() -> Optional[torch.dtype]:
    """Return the running execution's own default dtype; None when it uses the process's."""
    dtype: Optional[torch.dtype] = _core.default_dtype_in_force()
    return dtype


def set_in_force(dtype: torch.dtype) -> None:
    """Make ``dtype`` the running execution's default, until it is set again or the execution ends.

    Nothing is done if it is the default already. After compiling, Dynamo sets the dtype that it
    found before (torch 2.14.1, `preserve_global_state`), and it guards on the function modes of
    that time.

    Raises:
        TypeError: not a floating point dtype (as ``torch.set_default_dtype``).
    """
    _check(dtype)
    if dtype == (in_force() or sys.modules["torch"]._C.get_default_dtype()):
        return
    _intercept()
    _core.set_default_dtype(dtype)


@contextmanager
def holding(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the running code's default in the with block, regardless of the process's.

    Raises:
        TypeError: not a floating point dtype (as ``torch.set_default_dtype``).
    """
    _check(dtype)
    _intercept()
    with _core.with_default_dtype(dtype):
        yield


def intercepting() -> AbstractContextManager[None]:
    """Keep the running execution's default dtype on the thread to which it was carried."""
    dtype = in_force()
    return nullcontext() if dtype is None else holding(dtype)


def stop_intercepting() -> None:
    """Remove the interceptor from the calling thread; called when unneeded (rust/src/dtype.rs)."""
    while (mode := _interceptor()) is not None:
        _remove(mode)
    _core.note_intercepting(False)


def _check(dtype: Any) -> None:
    import torch

    if not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"only floating-point types are supported as the default type, not {dtype}")


def _intercept() -> None:
    """Install the interceptor on the calling thread, at most once."""
    _core.note_intercepting(True)  # first: an unneeded note is harmless and is removed later
    if _interceptor() is None:
        from torch.overrides import _push_mode

        from sglang_distguard.context.default_dtype_mode import DefaultDtypeMode

        _push_mode(DefaultDtypeMode())


def _interceptor() -> Optional[Any]:
    overrides = sys.modules.get("torch.overrides")
    stack = overrides._get_current_function_mode_stack() if overrides is not None else None
    if not stack:
        return None
    from sglang_distguard.context.default_dtype_mode import DefaultDtypeMode

    return next((mode for mode in reversed(stack) if isinstance(mode, DefaultDtypeMode)), None)


def _remove(mode: Any) -> None:
    """Remove ``mode`` from the thread's stack, even from below modes that code never removed."""
    from torch.overrides import _pop_mode, _push_mode

    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
