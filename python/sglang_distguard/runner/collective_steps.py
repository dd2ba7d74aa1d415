"""Steps that compute together with other ranks: in one order, or over communicators of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.distributed import owned_groups, world
from sglang_distguard.distributed.keys import GROUPS
from sglang_distguard.distributed.ranks import agreement, specs
from sglang_distguard.errors import (
    AmbiguousBuild,
    StateInUse,
)
from sglang_distguard.runner.captures import refuse_capture_without_turns
from sglang_distguard.sync.phases import Phase


def may_overlap(key: str) -> bool:
    """Whether runners of several ranks may compute at the same time, each rank in its own order.

    Not over shared groups: their collectives would meet each other's. Nor on GPUs: all threads
    launch on one stream by default, on which two communicators that wait in different orders on two
    ranks wait for ever (NCCL user guide, "Using multiple NCCL communicators concurrently"). Nor
    where SGLang reduces through memory that all groups of the process share (0.5.23:
    `is_shm_available`, `sgl_kernel.shm_allreduce`, on CPUs with AMX and on arm64).
    """
    from sglang.srt.runtime_context import get_device
    from sglang.srt.utils import cpu_has_amx_support, is_host_cpu_arm64

    by_memory = cpu_has_amx_support() or is_host_cpu_arm64()
    return key != GROUPS and get_device().device == "cpu" and not by_memory


def agree_on_one_more(server_args: Any) -> None:
    """Let the ranks agree on a runner that initialises nothing, a draft say, in its target's scope.

    Raises:
        RanksDisagree, AgreementTimeout, RankFailed, StoreLost, AmbiguousBuild: see ``errors``.
    """
    ranks = world.ranks()
    if ranks is None or agreement.asked() is not None or server_args is None:
        return
    spec = specs.model_spec(server_args)
    with agreement.turn(ranks, f"runner {specs.name_for(spec)}", spec, keep=True):
        pass


@contextmanager
def in_order(handle: _core.RunnerHandle, step: str) -> Iterator[None]:
    """Run a step that computes together with other ranks; after one another where it must be.

    A step that raises leaves its communicators out of step, and so does one that is refused while
    another thread is in one: other ranks may have let it in. They are destroyed (``distributed.owned_groups``).

    Raises:
        StateInUse, AmbiguousBuild: another thread is in a step over the same communicators.
        LeaseBroken: they were given up while this step waited for its turn.
        RankFailed, AgreementTimeout, StoreLost: see ``errors``.
    """
    ranks = world.ranks()
    if ranks is None or agreement.has_turn():
        yield
    elif handle.turns is not None:
        turn = agreement.turn(
            ranks,
            f"{handle.turns}, {step}",
            {},
            creates=False,
            undo=lambda: owned_groups.break_communicators(handle),
        )
        with ExitStack() as stack:
            with _let_in(handle):
                stack.enter_context(turn)
            handle.check()
            # Before the others are told: those that wait for this rank hear at once.
            with _whole(handle):
                yield
    else:
        with _let_in(handle):
            is_outermost = handle.begin_collectives()
        try:
            with _whole(handle) if is_outermost else nullcontext():
                yield
        finally:
            handle.end_collectives()


@contextmanager
def step_among_ranks(
    handle: _core.RunnerHandle,
    step: str,
    phase: Optional[Phase] = None,
    *,
    is_collective: bool = False,
    is_exclusive: bool = False,
) -> Iterator[None]:
    """What a step is where it is more than one native step: with several ranks, or to capture.

    The phase comes last, inside of the step's turn if it takes one.

    Args:
        handle: of the runner.
        step: name of the method.
        phase: which it is in.
        is_collective: computes together with the other ranks.
        is_exclusive: one thread at a time.
    """
    with ExitStack() as stack:
        with _let_in(handle) if is_exclusive else nullcontext():
            stack.enter_context(_core.step(handle, step, None, exclusive=is_exclusive))
        if phase == "capture":  # before it is among the ranks: nothing is half-done then
            refuse_capture_without_turns(handle)
        if is_collective:
            stack.enter_context(in_order(handle, step))
        if phase is not None:
            stack.enter_context(_core.step(handle, step, phase))
        yield


def collective_step_of(name: str, phase: Phase, runner: str) -> _core.StepOf:
    """What a method of a part of a runner runs in; with several ranks it takes its turn.

    Args:
        name: the method's.
        phase: the method's.
        runner: attributes, with dots, from the part to the runner, or to what returns it.
    """

    def otherwise(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[None]:
        return step_among_ranks(handle, step, phase, is_collective=True)

    return _core.StepOf(name, phase, runner=runner, otherwise=otherwise)


@contextmanager
def _let_in(handle: _core.RunnerHandle) -> Iterator[None]:
    """Give the communicators up when the with block refuses a step: other ranks may let it in."""
    try:
        yield
    except (AmbiguousBuild, StateInUse) as error:
        if world.ranks() is not None:
            error.add_note(
                "Other ranks may have let this step in, so that its collectives would meet those of "
                "another: the runner's communicators are given up on this rank, and so on all."
            )
            owned_groups.break_communicators(handle)
        raise


@contextmanager
def _whole(handle: _core.RunnerHandle) -> Iterator[None]:
    try:
        yield
    except BaseException:
        owned_groups.break_communicators(handle)
        raise
