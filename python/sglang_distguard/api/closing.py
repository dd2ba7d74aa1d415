"""``close``: release a runner's leases and its scope, when none of its methods runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Optional

from sglang_distguard import _core
from sglang_distguard.config.checks import check_flag, check_seconds
from sglang_distguard.errors import (
    AcquireTimeout,
    StateInUse,
)
from sglang_distguard.runner.handle import handle_of, release
from sglang_distguard.sync.phases import in_phase

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


@contextmanager
def closing(
    runner: ModelRunner, *, timeout: Optional[float] = None, force: bool = False
) -> Iterator[ModelRunner]:
    """``close(runner)`` at the end of a with block, also after an error; as ``contextlib.closing``.

    Args:
        runner: a runner that was built while the guard was installed.
        timeout: seconds to wait; see ``close``.
        force: do not wait; see ``close``.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        StateInUse, AcquireTimeout, DeadlockError: see ``close``.
    """
    timeout = _checked(timeout, force)
    handle = handle_of(runner)
    try:
        yield runner
    finally:
        _close(handle, timeout, force=force)


def close(runner: ModelRunner, *, timeout: Optional[float] = None, force: bool = False) -> bool:
    """Release a runner's leases and the values of its scope; its methods raise from then on.

    Waits until other threads have left the runner's methods. Memory of weights and caches is freed
    when the last reference to the runner is dropped.

    Args:
        runner: a runner that was built while the guard was installed.
        timeout: seconds to wait; default: the setting in force.
        force: do not wait. A running method continues, without the state that is released here.

    Returns:
        True the first time, False when the runner was closed before.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        StateInUse: the calling thread is in a method of the runner, or another thread still is
            after ``timeout``. Nothing was changed.
        AcquireTimeout: another runner's capture still prevents closing after ``timeout``. Nothing
            was changed.
        DeadlockError: the wait would never end. Nothing was changed.
    """
    return _close(handle_of(runner), _checked(timeout, force), force=force)


def _checked(timeout: Optional[float], force: bool) -> Optional[float]:
    check_flag("force", force)
    return None if timeout is None else check_seconds("timeout", timeout)


def _close(handle: _core.RunnerHandle, timeout: Optional[float], *, force: bool) -> bool:
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
    try:
        with in_phase("load", handle, timeout=timeout):
            return release(handle)
    except AcquireTimeout as error:
        inside = handle.inside()
        if not inside:  # another runner's capture is in the way
            raise
        at = ", ".join(f"{step or 'a method'}() in thread {thread}" for thread, step in inside)
        raise StateInUse(
            f"runner '{handle.name}' is still in {at}, after {error.details['waited']:.1f} s. Wait "
            "until that ends, allow more time (timeout=...), or close it with force=True",
            runner=handle.name,
            holders=[thread for thread, _ in inside],
            steps=[step for _, step in inside],
        ) from error
