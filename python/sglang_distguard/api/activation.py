"""``activate``: code around a runner's methods runs as the runner's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from sglang_distguard import _core
from sglang_distguard.runner.handle import handle_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def activate(runner: ModelRunner) -> AbstractContextManager[ModelRunner]:
    """Make the calling thread's or asyncio task's code ``runner``'s for a with block.

    A runner's own methods do this by themselves, and so does what is given the runner; code around
    them that reads SGLang's context (``get_server_args()`` …) needs it. It holds nothing: the
    block may idle.

    Args:
        runner: built while distguard was installed.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        DistGuardError: the runner was closed.
        LeaseBroken: what it was built on was torn down by force.
        ForkedError: the runner was built in the parent process.
    """
    return _core.Activation(handle_of(runner), runner)
