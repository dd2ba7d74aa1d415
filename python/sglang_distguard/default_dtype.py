"""A default dtype of torch that belongs to one thread.

`torch.set_default_dtype` is process-wide (a C++ static, torch 2.14), and SGLang holds it for the
whole weight load. Here a TorchFunctionMode, which torch itself keeps per thread, gives functions
that would consult the process's default the thread's instead. No lock, and the same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import torch


def is_traced() -> bool:
    """Whether Dynamo is tracing the calling code, which reads True for this.

    Not `torch.compiler.is_compiling`: that is one flag of the process (torch 2.14.1), and says yes to
    a thread that loads a model while another one compiles.
    """
    torch = sys.modules["torch"]
    return bool(torch.compiler.is_dynamo_compiling())


def of_thread() -> Optional[torch.dtype]:
    """The calling thread's own default dtype, None when it has the process's."""
    mode = _innermost()
    return None if mode is None else mode.dtype


def set_in_thread(dtype: torch.dtype) -> None:
    """Make ``dtype`` the calling thread's default until it is set again or ``reset_thread``.

    Raises:
        TypeError: not a floating point dtype (as ``torch.set_default_dtype``).
    """
    import torch

    if not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"only floating-point types are supported as the default type, not {dtype}")
    mode = _innermost()
    if mode is not None:
        mode.dtype = dtype
        return
    from sglang_distguard.dtype_mode import DefaultDtypeMode, process_default

    if dtype != process_default():
        DefaultDtypeMode(dtype).__enter__()


def reset_thread() -> None:
    """Give the calling thread the process's default dtype again."""
    while (mode := _innermost()) is not None:
        _remove(mode)


@contextmanager
def thread_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the calling thread's default inside the with block."""
    mode = _innermost()
    before = None if mode is None else mode.dtype
    set_in_thread(dtype)
    try:
        yield
    finally:
        if before is not None:
            set_in_thread(before)
        else:
            reset_thread()


def _innermost() -> Optional[Any]:
    overrides = sys.modules.get("torch.overrides")
    stack = overrides._get_current_function_mode_stack() if overrides is not None else None
    if not stack:
        return None
    from sglang_distguard.dtype_mode import DefaultDtypeMode

    return next((mode for mode in reversed(stack) if isinstance(mode, DefaultDtypeMode)), None)


def _remove(mode: Any) -> None:
    """Take ``mode`` off the thread's stack, from below others too (code that never restored)."""
    from torch.overrides import _pop_mode, _push_mode

    above = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
