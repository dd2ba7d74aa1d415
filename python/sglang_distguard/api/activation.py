"""``activate``: run the code around a runner's methods in the runner's scope."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from sglang_distguard import _core
from sglang_distguard.runner.handle import handle_of
from sglang_distguard.runner.streams import OnItsStream

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def activate(runner: ModelRunner) -> AbstractContextManager[ModelRunner]:
    """Run the code of a with block, in the calling thread or asyncio task, in ``runner``'s scope.

    A runner's own methods do this by themselves, and so do SGLang's functions that are given the
    runner. Other code that reads SGLang's context (``get_server_args()`` …) needs this with block.
    It holds nothing: the block may stay open while idle. If the runner has a CUDA stream of its own
    (``install(streams="own")``), that is current in the block.

    Args:
        runner: a runner that was built while the guard was installed.

    Returns:
        A context manager; ``with … as`` gives the runner.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        DistGuardError: the runner is closed. This and the following are raised where the with block
            begins.
        LeaseBroken: state on which the runner was built was torn down by force.
        ForkedError: the runner was built in the parent process.
    """
    handle = handle_of(runner)
    activation = _core.Activation(handle, runner)
    stream = handle.stream
    return activation if stream is None else OnItsStream(activation, stream)
