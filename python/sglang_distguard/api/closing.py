"""``close``: a runner releases its leases and its scope, when no method of it runs."""

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
    """``close(runner)`` at the end of a with block, however that ends; as ``contextlib.closing``.

    Args:
        runner: built while distguard was installed.
        timeout: see ``close``.
        force: see ``close``.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        StateInUse: see ``close``.
    """
    handle = handle_of(runner)
    try:
        yield runner
    finally:
        _close(handle, timeout, force=force)


def close(runner: ModelRunner, *, timeout: Optional[float] = None, force: bool = False) -> bool:
    """Release a runner's leases and the values of its scope; its methods raise from then on.

    Waits for the methods of the runner that other threads are in. Memory of weights and caches is
    freed when the last reference to the runner goes.

    Args:
        runner: built while distguard was installed.
        timeout: seconds to wait; default: the setting in force.
        force: do not wait. A method that runs goes on, without what is released here.

    Returns:
        True the first time, False when the runner was closed before.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        StateInUse: a method of the runner runs still, in the calling thread or after ``timeout``.
            Nothing was changed.
    """
    check_flag("force", force)
    if timeout is not None:
        timeout = check_seconds("timeout", timeout)
    return _close(handle_of(runner), timeout, force=force)


def _close(handle: _core.RunnerHandle, timeout: Optional[float], *, force: bool) -> bool:
    if force or handle.closed:
        return release(handle)
    execution = _core.current_execution()
    if execution is not None and execution.runner is handle and execution.step is not None:
        raise StateInUse(
            f"runner '{handle.name}' cannot be closed from within its own {execution.step}(): the rest of "
            "that would run on what is released. Close it afterwards, or with force=True",
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
            f"runner '{handle.name}' is still in {at}, after {error.details['waited']:.1f} s. Let that end, "
            "allow more time (timeout=...), or close it with force=True",
            runner=handle.name,
            holders=[thread for thread, _ in inside],
            steps=[step for _, step in inside],
        ) from error
