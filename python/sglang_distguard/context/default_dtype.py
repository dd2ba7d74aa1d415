"""A default dtype of torch that belongs to one execution.

`torch.set_default_dtype` is process-wide (a C++ static, torch 2.14), and SGLang holds it for the whole
weight load. Here the running execution carries the dtype (rust/src/execution.rs), and a
TorchFunctionMode, which torch keeps per thread, gives functions that would consult the process's default
that one instead. The mode holds no state: code whose execution carries no dtype passes through it, be it
another asyncio task of the thread. It is taken off when no execution needs it (rust/src/dtype.rs).
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
    """Whether Dynamo is tracing the calling code, which reads True for this.

    Not `torch.compiler.is_compiling`: that is one flag of the process (torch 2.14.1), and says yes to
    a thread that loads a model while another one compiles.
    """
    torch = sys.modules["torch"]
    return bool(torch.compiler.is_dynamo_compiling())


def in_force() -> Optional[torch.dtype]:
    """The running execution's own default dtype, None when it has the process's."""
    dtype: Optional[torch.dtype] = _core.default_dtype_in_force()
    return dtype


def set_in_force(dtype: torch.dtype) -> None:
    """Make ``dtype`` the running execution's default until it is set again or the execution is left.

    Nothing is done where it is the default already: Dynamo sets what it found when it has compiled
    (torch 2.14.1, `preserve_global_state`), and guards on the function modes that there were.

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
    """Make ``dtype`` the running code's default inside the with block, whatever the process's is.

    Raises:
        TypeError: not a floating point dtype (as ``torch.set_default_dtype``).
    """
    _check(dtype)
    _intercept()
    with _core.with_default_dtype(dtype):
        yield


def intercepting() -> AbstractContextManager[None]:
    """Keep the default dtype that the running execution carries in a thread that it comes to."""
    dtype = in_force()
    return nullcontext() if dtype is None else holding(dtype)


def stop_intercepting() -> None:
    """Take the interceptor off the calling thread; called when nothing needs it (rust/src/dtype.rs)."""
    while (mode := _interceptor()) is not None:
        _remove(mode)
    _core.note_intercepting(False)


def _check(dtype: Any) -> None:
    import torch

    if not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"only floating-point types are supported as the default type, not {dtype}")


def _intercept() -> None:
    """Put the interceptor on the calling thread, once."""
    _core.note_intercepting(True)  # first: what is noted in vain is taken off all the same
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
    """Take ``mode`` off the thread's stack, from below others too (code that never restored)."""
    from torch.overrides import _pop_mode, _push_mode

    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
