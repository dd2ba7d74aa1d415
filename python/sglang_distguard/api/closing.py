"""``close``: end a runner or a manager, when none of its methods runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional, TypeVar, Union

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.config.checks import check_flag, check_seconds
from sglang_distguard.errors import (
    AcquireTimeout,
    StateInUse,
)
from sglang_distguard.hooks import endings
from sglang_distguard.runner.budget import release_memory
from sglang_distguard.runner.collective_steps import is_in_block_with
from sglang_distguard.runner.handle import clear_closed, handle_of, handle_of_any, release
from sglang_distguard.sync import waiting
from sglang_distguard.sync.phases import in_phase

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner import ModelRunner

    Resident = Union[ModelRunner, Scheduler, TokenizerManager, DetokenizerManager]
    Living = TypeVar("Living", bound=Resident)


@contextmanager
def closing(
    runner: Living, *, timeout: Optional[float] = None, force: bool = False
) -> Iterator[Living]:
    """``close(runner)`` at the end of a with block, also after an error; as ``contextlib.closing``.

    Args:
        runner: a runner or manager that was built while the guard was installed.
        timeout: seconds to wait; see ``close``.
        force: do not wait; see ``close``.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        StateInUse, AcquireTimeout, DeadlockError: see ``close``.
    """
    timeout = _checked(timeout, force)
    _handle_of(runner)
    try:
        yield runner
    finally:
        _close(runner, timeout, force=force)


def close(runner: Resident, *, timeout: Optional[float] = None, force: bool = False) -> bool:
    """Release a runner's leases and the values of its scope; its methods raise from then on.

    Waits until other threads have left the runner's methods. The runner has no attributes then, so
    that memory of its weights and caches is freed, and given back to a GPU, unless other code refers
    to them. With ``force`` that happens when the last reference to the runner is dropped.

    A manager of SGLang is closed in the same way: a Scheduler, with the runners that it has built,
    a TokenizerManager or a DetokenizerManager. The event loop of a Scheduler or DetokenizerManager
    is told to end as SGLang's own shutdown does, and is waited for; requests that a
    TokenizerManager is answering are waited for, and its own tasks are cancelled. Sockets, watchdog
    threads and descriptors of the manager are closed.

    Args:
        runner: a runner or manager that was built while the guard was installed.
        timeout: seconds to wait; default: the setting in force.
        force: do not wait. A running method continues, without the state that is released here. The
            sockets of a manager that is inside one stay open.

    Returns:
        True the first time, False when the runner was closed before.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        StateInUse: the calling thread is in a method of the runner, or in a block of ``turn`` with
            it, or another thread still is in a method after ``timeout``. Nothing was changed, except
            that a manager's event loop was told to end.
        AcquireTimeout: another runner's capture still prevents closing after ``timeout``. Nothing
            was changed.
        DeadlockError: the wait would never end. Nothing was changed.
    """
    return _close(runner, _checked(timeout, force), force=force)


def _handle_of(resident: Resident) -> _core.RunnerHandle:
    handle = handle_of_any(resident)
    return handle if handle is not None and handle.manager else handle_of(resident)


def _checked(timeout: Optional[float], force: bool) -> Optional[float]:
    check_flag("force", force)
    return None if timeout is None else check_seconds("timeout", timeout)


def _close(resident: Resident, timeout: Optional[float], *, force: bool) -> bool:
    handle = _handle_of(resident)
    if handle.manager is None:
        closed = _close_runner(handle, timeout, force=force)
        if closed and not force:  # else a method may still run
            clear_closed(resident)
            release_memory(timeout)
        return closed
    if handle.closed:
        return False
    if force:
        endings.ask(resident, handle)
        # zmq's sockets may not be closed under the thread that uses them.
        return endings.release_all(handle) if handle.inside() else endings.end(resident, handle)
    seconds = settings.current().timeout if timeout is None else timeout
    until = time.monotonic() + seconds
    method = handle.inside_here()
    if method is not None:
        raise StateInUse(
            f"{handle.manager} '{handle.name}' cannot be closed in a thread that is in its "
            f"{method}(): that would never end. Close it when the call has ended, from another "
            "thread, or with force=True",
            runner=handle.name,
            step=method,
        )
    endings.ask(resident, handle)
    waiting.until(
        lambda: handle.end_if_vacant() or None,
        _Calls(handle, seconds),
        timeout=seconds,
        what=f"the calls in {handle.name}",
    )
    try:
        for runner in handle.runners:
            _close_runner(runner, max(until - time.monotonic(), 0.0), force=False)
    finally:
        # A runner of its own that other code is in is closed regardless, as with force.
        endings.end(resident, handle)
    return True


class _Calls:
    """Waits for the calls inside a manager to leave."""

    patience = math.inf

    def __init__(self, handle: _core.RunnerHandle, seconds: float) -> None:
        self._handle = handle
        self._seconds = seconds

    def wait(self, seconds: float) -> None:
        self._handle.wait_for_calls(seconds)

    def timed_out(self) -> Exception:
        return _still_inside(self._handle, self._seconds)


def _still_inside(handle: _core.RunnerHandle, waited: float) -> StateInUse:
    inside = handle.inside()
    at = ", ".join(f"{step or 'a method'}() in thread {thread}" for thread, step in inside)
    return StateInUse(
        f"{handle.manager or 'runner'} '{handle.name}' is still in {at}, after {waited:.1f} s. Wait "
        "until that ends, allow more time (timeout=...), or close it with force=True",
        runner=handle.name,
        holders=[thread for thread, _ in inside],
        steps=[step for _, step in inside],
    )


def _close_runner(handle: _core.RunnerHandle, timeout: Optional[float], *, force: bool) -> bool:
    if force or handle.closed:
        return release(handle)
    execution = _core.current_execution()
    if execution is not None and execution.runner is handle and execution.step is not None:
        raise StateInUse(
            f"runner '{handle.name}' cannot be closed from within its own {execution.step}(): the "
            "rest of that call would run on released state. Close it after the call, or with "
            "force=True",
            runner=handle.name,
            step=execution.step,
        )
    if is_in_block_with(handle):
        raise StateInUse(
            f"runner '{handle.name}' cannot be closed within a block of sglang_distguard.turn in which "
            "it computes: other ranks may still be in its steps. Close it after the block, or with "
            "force=True",
            runner=handle.name,
            step="turn",
        )
    try:
        with in_phase("load", handle, timeout=timeout):
            return release(handle)
    except AcquireTimeout as error:
        if not handle.inside():  # another runner's capture is in the way
            raise
        raise _still_inside(handle, error.details["waited"]) from error
