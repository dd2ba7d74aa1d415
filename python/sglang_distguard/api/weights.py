"""Weights that runners share, and the memory of a runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from sglang_distguard.config.checks import check_seconds
from sglang_distguard.runner import memory as measured
from sglang_distguard.runner import weights
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.runner.memory import Memory

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def detach_weights(runner: ModelRunner, *, timeout: Optional[float] = None) -> bool:
    """Give a runner that shares weights a copy of its own, so that they may be updated.

    Waits until other threads have left the runner's methods. The others go on sharing.

    Args:
        runner: a runner that was built while the guard was installed.
        timeout: seconds to wait; default: the setting in force.

    Returns:
        True if weights were copied; False if no other runner shares them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
        DistGuardError: the runner is closed.
        NotSupported: it has captured graphs, which hold the addresses of the shared weights.
        AcquireTimeout, DeadlockError: it is in one of its methods for longer than ``timeout``, or
            the wait would never end. Nothing was changed.
    """
    handle_of(runner).check()
    seconds = None if timeout is None else check_seconds("timeout", timeout)
    return weights.detach(runner, timeout=seconds)


def memory(runner: ModelRunner) -> Memory:
    """Return how much memory the tensors of a runner take.

    Args:
        runner: a runner that was built while the guard was installed.

    Raises:
        TypeError: ``runner`` was not built under the guard.
    """
    handle_of(runner)
    return measured.measure([runner])
