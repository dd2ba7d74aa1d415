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
from sglang_distguard.distributed.ranks.ask import Ask
from sglang_distguard.distributed.ranks.failures import in_short
from sglang_distguard.distributed.ranks.log import Ranks
from sglang_distguard.errors import AmbiguousBuild, LeaseBroken, StateInUse
from sglang_distguard.runner.captures import refuse_capture_without_turns
from sglang_distguard.sync.phases import Phase

#: Errors of a step that finds another thread in one.
_REFUSALS = (AmbiguousBuild, StateInUse)


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


def _in_order(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[object]:
    """Run a step that computes together with other ranks, in a turn where that is necessary.

    A step that raises leaves its communicators out of step. So does a step that is refused because
    another thread is in one, since other ranks may have admitted it. Such communicators are
    destroyed (``distributed.owned_groups``).

    Args:
        handle: the runner's handle.
        step: name of the method.

    Raises:
        StateInUse, AmbiguousBuild: another thread is in a step over the same communicators.
        LeaseBroken: the communicators were destroyed, maybe while this step waited for its turn.
        RankFailed, AgreementTimeout, StoreLost: see ``errors``.
    """
    ranks = world.ranks()
    if ranks is None:
        return nullcontext()
    handle.check()  # before it meets other ranks, so that nothing is half-done
    if handle.turns is None:
        return _without_turns(handle)
    outer = agreement.turn_in_force()
    if outer is None:
        return _in_a_turn(ranks, handle, step)
    if isinstance(outer.users, _Users):
        return _within_turn(handle, outer, outer.users)
    return nullcontext()  # a turn in which a runner is built


@contextmanager
def in_one_turn(handle: _core.RunnerHandle) -> Iterator[None]:
    """Let all steps in the with block have one turn together, where each would take one.

    A block in a step, or in another block, is part of its turn. What raises in the block leaves the
    ranks out of step, as in a step.

    Args:
        handle: handle of a runner; all ranks begin the block with this one.

    Raises:
        DistGuardError and its subclasses: see ``_in_order``.
        Whatever a step in the block raised, at the end of the block if its code has caught that.
    """
    handle.check()
    ranks = world.ranks()
    outer = agreement.turn_in_force()
    if ranks is None or handle.turns is None:
        yield
    elif outer is None:
        with _in_a_turn(ranks, handle, "turn", is_block=True):
            yield
    elif isinstance(outer.users, _Users):
        outer.users.add(handle)
        with outer.users.whole(handle):
            _refuse_if_ended(outer, handle)
            yield
    else:  # a turn in which a runner is built
        yield


def is_in_block_with(handle: _core.RunnerHandle) -> bool:
    """Whether the running code is in a block whose turn is of ``handle``'s runner, or has its steps."""
    ask = agreement.turn_in_force()
    if ask is None or not ask.is_block:
        return False
    return isinstance(ask.users, _Users) and handle in ask.users.handles


class _Users:
    """The runners that compute in one turn.

    If a rank leaves it half-done, the communicators of all of them are out of step.

    Attributes:
        handles: that of the runner that has taken the turn, and those of the others.
    """

    def __init__(self, handle: _core.RunnerHandle) -> None:
        self.handles = [handle]
        self._error: Optional[BaseException] = None

    def add(self, handle: _core.RunnerHandle) -> None:
        if handle not in self.handles:
            self.handles.append(handle)

    def destroy_communicators(self, why: str) -> None:
        with ExitStack() as stack:  # all of them, even if one raises
            for handle in self.handles:
                stack.callback(owned_groups.destroy_communicators, handle, why)

    def fail(self, handle: _core.RunnerHandle, error: BaseException) -> None:
        """Note what a part of the turn has raised: the turn does, even if code in between catches it."""
        self._error = self._error or error
        owned_groups.destroy_communicators(handle, in_short(error))

    def refuse(self, handle: _core.RunnerHandle, error: BaseException) -> None:
        """Note that a step could not begin in the turn (`_core.StepInTurn`)."""
        if isinstance(error, _REFUSALS):
            _destroy_for_refusal(handle, error)
        self.fail(handle, error)

    @contextmanager
    def whole(self, handle: _core.RunnerHandle) -> Iterator[None]:
        """Run a block that is a part of the turn."""
        try:
            yield
        except BaseException as error:
            self.fail(handle, error)
            raise

    @contextmanager
    def all_whole(self) -> Iterator[None]:
        """Run the turn; raise at its end what a part of it has raised."""
        try:
            yield
            if self._error is not None:
                raise self._error
        except BaseException as error:
            self.destroy_communicators(in_short(error))
            raise


@contextmanager
def _in_a_turn(
    ranks: Ranks, handle: _core.RunnerHandle, step: str, *, is_block: bool = False
) -> Iterator[None]:
    """Take a turn for the with block: one step, or a block with several."""
    users = _Users(handle)
    turn = agreement.turn(
        ranks,
        f"{handle.turns}, {step}",
        {},
        creates=False,
        undo=users.destroy_communicators,
        users=users,
        is_block=is_block,
    )
    with ExitStack() as stack:
        try:
            ask = stack.enter_context(turn)
        except _REFUSALS as error:
            _destroy_for_refusal(handle, error)
            raise
        handle.check()
        # Break before the turn reports: ranks that wait for this rank get an error at once.
        with users.all_whole():
            with nullcontext() if is_block else _claiming(handle):
                yield
            # Refused while another thread is in a step of the turn.
            with _claiming(handle, "the end of this block"):
                ask.has_left_turn = True


@contextmanager
def _within_turn(handle: _core.RunnerHandle, turn: Ask, users: _Users) -> Iterator[None]:
    """Run a step in the turn of a block, or of another step.

    Threads that were started there carry the turn. One at a time is in a step, because nothing
    orders the collectives of two on all ranks.
    """
    # `_core.StepInTurn` does the same for the methods that a decode calls, while nothing refuses.
    first = users.handles[0]
    with _claiming(handle) as is_outermost, nullcontext() if first is handle else _claiming(first):
        if agreement.turn_in_force() is None:
            raise _ended_at_the_same_moment(handle)
        users.add(handle)
        try:
            _refuse_if_ended(turn, handle)
            yield
        except BaseException as error:
            if is_outermost:
                users.fail(handle, error)
            raise


@contextmanager
def _without_turns(handle: _core.RunnerHandle) -> Iterator[None]:
    """Run a step whose collectives meet no other runner's."""
    with _claiming(handle) as is_outermost:
        try:
            yield
        except BaseException as error:
            if is_outermost:
                owned_groups.destroy_communicators(handle, in_short(error))
            raise


def _refuse_if_ended(turn: Ask, handle: _core.RunnerHandle) -> None:
    """Refuse a step in a turn that the beating thread has ended: no other rank comes to it.

    Call it when the runner is one of the turn's users. Those whose communicators that thread
    destroys are read after the turn is marked as ended, so the runner is one of them, or refused.
    """
    if turn.was_ended:
        raise LeaseBroken(
            f"runner '{handle.name}' cannot compute in {turn.what}: another rank failed in it or gives "
            "no sign of life, so its communicators are destroyed. Leave the block, whose error names "
            "that rank, and build its runners again",
            key=turn.what,
            by=None,
            how="ended",
        )


def _ended_at_the_same_moment(handle: _core.RunnerHandle) -> StateInUse:
    error = StateInUse(
        f"runner '{handle.name}': the block in whose turn this step was to be ended at the same "
        "moment. Let the threads that a block starts end their steps within the block",
        runner=handle.name,
    )
    _destroy_for_refusal(handle, error)
    return error


@contextmanager
def _claiming(handle: _core.RunnerHandle, what: str = "this step") -> Iterator[bool]:
    """Claim the communicators of the runner's scope; False if an outer step has."""
    try:
        is_outermost = handle.begin_collectives()
    except _REFUSALS as error:
        _destroy_for_refusal(handle, error, what)
        raise
    try:
        yield is_outermost
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

    The step enters its phase last, within its turn if it takes one. A thread that waits for the
    turn does not occupy the runner: a block that has the turn may come to the same step.

    Args:
        handle: the runner's handle.
        step: name of the method.
        phase: phase of the method, if it has one.
        is_collective: whether the step computes together with the other ranks.
        is_exclusive: whether only one thread at a time may be in the step.

    Raises:
        NotSupported: see ``refuse_capture_without_turns``.
        DistGuardError and its subclasses: see ``_in_order`` and ``_core.Step``.
    """
    if phase == "capture":  # before it meets other ranks, so that nothing is half-done
        refuse_capture_without_turns(handle)
    has_entered = False
    with _in_order(handle, step) if is_collective else nullcontext():
        try:
            with _core.step(handle, step, phase, exclusive=is_exclusive):
                has_entered = True
                yield
        except _REFUSALS as error:
            if is_exclusive and not has_entered:
                _destroy_for_refusal(handle, error)
            raise


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


def _destroy_for_refusal(
    handle: _core.RunnerHandle, error: StateInUse | AmbiguousBuild, what: str = "this step"
) -> None:
    """Destroy the communicators, because ``what`` is refused: other ranks may have admitted it."""
    if world.ranks() is not None:
        error.add_note(
            f"Other ranks may have admitted {what}, and collectives of different steps would "
            "meet. So the runner's communicators are destroyed on this rank, and therefore on "
            "all ranks."
        )
        owned_groups.destroy_communicators(handle, in_short(error))
