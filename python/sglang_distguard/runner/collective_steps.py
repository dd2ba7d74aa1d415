"""Steps that compute together with other ranks: in one order, or over separate communicators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import generation
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

    They may not in three cases:

    - Over shared groups, because collectives of different runners would meet each other.
    - On GPUs, because all threads launch on one stream by default. Two communicators that wait
      there in different orders on two ranks wait forever (NCCL user guide, "Using multiple NCCL
      communicators concurrently").
    - Where SGLang reduces through memory that all groups of the process share (0.5.23:
      `is_shm_available`, `sgl_kernel.shm_allreduce`, on CPUs with AMX and on arm64).

    Args:
        key: registry key of the groups that the runner uses.
    """
    from sglang.srt.utils import cpu_has_amx_support, is_host_cpu_arm64

    by_memory = cpu_has_amx_support() or is_host_cpu_arm64()
    return key != GROUPS and generation.current().device() == "cpu" and not by_memory


def agree_on_one_more(server_args: Any) -> None:
    """Let the ranks agree on a runner that initialises nothing, such as a draft runner.

    Such a runner uses its target's scope.

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
    """Run a step that computes together with other ranks, in a turn where that is necessary.

    A step that raises leaves its communicators out of step. So does a step that is refused because
    another thread is in one, since other ranks may have admitted it. Such communicators are
    destroyed (``distributed.owned_groups``).

    Args:
        handle: the runner's handle.
        step: name of the method.

    Raises:
        StateInUse, AmbiguousBuild: another thread is in a step over the same communicators.
        LeaseBroken: the communicators were destroyed while this step waited for its turn.
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
            # Break before the turn reports: ranks that wait for this rank get an error at once.
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
    """Run a step that needs more than one native step: with several ranks, or for a capture.

    The step enters its phase last, within its turn if it takes one.

    Args:
        handle: the runner's handle.
        step: name of the method.
        phase: phase of the method, if it has one.
        is_collective: whether the step computes together with the other ranks.
        is_exclusive: whether only one thread at a time may be in the step.

    Raises:
        NotSupported: see ``refuse_capture_without_turns``.
        DistGuardError and its subclasses: see ``in_order`` and ``_core.Step``.
    """
    with ExitStack() as stack:
        with _let_in(handle) if is_exclusive else nullcontext():
            stack.enter_context(_core.step(handle, step, None, exclusive=is_exclusive))
        if phase == "capture":  # before it meets other ranks, so that nothing is half-done
            refuse_capture_without_turns(handle)
        if is_collective:
            stack.enter_context(in_order(handle, step))
        if phase is not None:
            stack.enter_context(_core.step(handle, step, phase))
        yield


def collective_step_of(name: str, phase: Phase, runner: str) -> _core.StepOf:
    """Return the step of a method of a runner's part; with several ranks it is a collective step.

    Args:
        name: name of the method.
        phase: phase of the method.
        runner: attributes, with dots, from the part to the runner or to a function that returns it.
    """

    def otherwise(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[None]:
        return step_among_ranks(handle, step, phase, is_collective=True)

    return _core.StepOf(name, phase, runner=runner, otherwise=otherwise)


@contextmanager
def _let_in(handle: _core.RunnerHandle) -> Iterator[None]:
    """Destroy the communicators if the with block refuses a step: other ranks may admit it."""
    try:
        yield
    except (AmbiguousBuild, StateInUse) as error:
        if world.ranks() is not None:
            error.add_note(
                "Other ranks may have admitted this step. Its collectives would meet those of "
                "another step, so the runner's communicators are destroyed on this rank, and "
                "therefore on all ranks."
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
