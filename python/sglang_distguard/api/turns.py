"""``turn``: several steps of runners of several ranks, agreed on by the ranks once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from sglang_distguard import _core
from sglang_distguard.runner import collective_steps
from sglang_distguard.runner.handle import handle_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def turn(runner: ModelRunner) -> AbstractContextManager[ModelRunner]:
    """Let the steps of a with block take one turn among the ranks together, not one each.

    In a world of several ranks, a step that computes with other ranks takes a turn with
    ``groups="share"``, on GPUs, and on CPUs with AMX or of arm64. Each turn is agreed on through the
    world's store. All ranks must enter the block with the same runner, and call the same steps
    there, as they must without it. Steps of other runners inside are part of the turn.

    Steps of other threads wait until the block has ended, so let it be short, and begin no steps in
    threads that outlive it. One thread at a time may be in a step of the block. Build runners before
    the block or after it. If a step in the block raises, so does the block, on all ranks, and the
    communicators of all runners that have computed in it are destroyed, as after a step that raises.

    With one rank, and where steps take no turns, the block changes nothing. A block within another
    one, or within a step, is part of it.

    Args:
        runner: a runner that was built while the guard was installed.

    Returns:
        A context manager, to be entered once; ``with … as`` gives the runner.

    Raises:
        TypeError: ``runner`` was not built under the guard.
        DistGuardError: the runner is closed. This and the following are raised where the with block
            begins.
        LeaseBroken: state on which the runner was built was torn down by force, or a step was left
            half-done.
        ForkedError: the runner was built in the parent process.
        AmbiguousBuild: another thread of this process is in a block of the runner. The runner's
            communicators are destroyed, because the ranks cannot tell the two blocks apart.
        RankFailed, AgreementTimeout, StoreLost: another rank did not come, or failed in the block,
            or the world's store cannot be reached. Raised where the block begins or ends.
        StateInUse: another thread is still in a step of the block, where the block ends.
    """
    return _turn(runner, handle_of(runner))


@contextmanager
def _turn(runner: ModelRunner, handle: _core.RunnerHandle) -> Iterator[ModelRunner]:
    with collective_steps.in_one_turn(handle):
        yield runner
