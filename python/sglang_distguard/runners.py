"""A runner's handle: its name, its scope and its leases. Binding, entering and closing runners."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard import (
    _core,
    groups,
    ownership,
    process_wide,
    rooms,
    settings,
    world,
)
from sglang_distguard.errors import (
    AcquireTimeout,
    AmbiguousBuild,
    DistGuardError,
    NotSupported,
    StateInUse,
)
from sglang_distguard.groups import GROUPS, WORLD
from sglang_distguard.naming import name_of_model
from sglang_distguard.process_wide import PROCESS
from sglang_distguard.ranks import agreement, specs
from sglang_distguard.targets.expert_location import experts_key

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

_ATTRIBUTE = "_sglang_distguard_handle"
_numbers = itertools.count(1)


def find_handle(runner: Any) -> Optional[_core.RunnerHandle]:
    """The handle of a runner built under the guard; None for any other object."""
    return getattr(runner, "__dict__", {}).get(_ATTRIBUTE)


def bind(runner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _core.RunnerHandle:
    """Give a runner that is about to be constructed the current scope, and leases on shared state.

    The leases end with ``close``, or when the runner is garbage-collected.
    """
    scope = _core.current_scope()
    ask = agreement.asked()
    name = settings.current().name or (ask.name if ask else None) or _default_name(args, kwargs)
    own = groups.own_key(scope)
    used = own if _core.has_joined(own) else GROUPS
    # What this scope joined and was torn down since is asked for, too: to be refused.
    keys = [key for key in (WORLD, PROCESS, used) if _core.is_ready(key) or _core.has_joined(key)]
    turns = None if ask is None or may_overlap(used) else ask.known_as
    handle = _handle(name, scope, keys, turns)
    if scope is not None and _core.live_runners(scope) == 1:  # a draft is in its target's
        scope.label = name
    setattr(runner, _ATTRIBUTE, handle)
    return handle


def _handle(
    name: str, scope: Optional[_core.Scope], keys: list[str], turns: Optional[str]
) -> _core.RunnerHandle:
    deadline = time.monotonic() + settings.current().timeout
    while True:
        try:
            return _core.RunnerHandle(
                name, scope, keys, turns=turns, ranks=world.ranks() is not None
            )
        except DistGuardError as error:
            if type(error) is not DistGuardError or error.details.get("key") != PROCESS:
                raise
            if time.monotonic() > deadline:
                raise
        # Between `agree` and here nobody held it, and another thread asked for more.
        process_wide.agree()


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
    another thread is in one: other ranks may have let it in. They are given up (``ownership``).

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
            undo=lambda: ownership.break_communicators(handle),
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


def refuse_capture_without_turns(handle: _core.RunnerHandle) -> None:
    """A capture waits for the forwards of this rank, and they for those of ranks that capture already.

    Raises:
        NotSupported: there are several ranks, and their steps take no turns.
    """
    if world.ranks() is not None and handle.turns is None:
        raise NotSupported(
            f"runner '{handle.name}' captures graphs on one of several ranks while others may run "
            'in any order. Build the runners of this process with runner_scope(groups="share"), '
            "whose steps take turns, or without graphs (disable_cuda_graph, no torch.compile)."
        )


@contextmanager
def capture_of_anybody() -> Iterator[None]:
    """Keep runners out while a graph is captured, by whatever code, and wait for those at work.

    Raises:
        NotSupported: there are several ranks, this is in no turn, and other runners live here.
        AcquireTimeout, DeadlockError: see ``rooms.room``.
    """
    if world.ranks() is None or agreement.has_turn():
        with rooms.room("capture"):
            yield
        return
    here = _core.current_scope()
    others = [scope for scope in (None, *_core.live_scopes()) if scope is not here]
    held = [scope.label if scope else "(default)" for scope in others if _core.live_runners(scope)]
    if held:
        raise NotSupported(
            "a graph is captured outside of the steps that take turns, on one of several ranks, while "
            f"runners live in other scopes ({', '.join(held)}): it would wait for their forwards, and "
            "they may wait for ranks that capture already. Capture before those are built.",
            scopes=held,
        )
    yield


@contextmanager
def step_among_ranks(
    handle: _core.RunnerHandle,
    step: str,
    room: Optional[rooms.Room] = None,
    *,
    is_collective: bool = False,
    is_exclusive: bool = False,
) -> Iterator[None]:
    """What a step is where it is more than one native step: with several ranks, or to capture.

    The room comes last, inside of the step's turn if it takes one.

    Args:
        handle: of the runner.
        step: name of the method.
        room: which it is in.
        is_collective: computes together with the other ranks.
        is_exclusive: one thread at a time.
    """
    with ExitStack() as stack:
        with _let_in(handle) if is_exclusive else nullcontext():
            stack.enter_context(_core.step(handle, step, None, exclusive=is_exclusive))
        if room == "capture":  # before it is among the ranks: nothing is half-done then
            refuse_capture_without_turns(handle)
        if is_collective:
            stack.enter_context(in_order(handle, step))
        if room is not None:
            stack.enter_context(_core.step(handle, step, room))
        yield


def collective_step_of(name: str, room: rooms.Room, runner: str) -> _core.StepOf:
    """What a method of a part of a runner runs in; with several ranks it takes its turn.

    Args:
        name: the method's.
        room: the method's.
        runner: attributes, with dots, from the part to the runner, or to what returns it.
    """

    def otherwise(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[None]:
        return step_among_ranks(handle, step, room, is_collective=True)

    return _core.StepOf(name, room, runner=runner, otherwise=otherwise)


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
            ownership.break_communicators(handle)
        raise


@contextmanager
def _whole(handle: _core.RunnerHandle) -> Iterator[None]:
    try:
        yield
    except BaseException:
        ownership.break_communicators(handle)
        raise


def hold_experts(handle: _core.RunnerHandle) -> None:
    """Lease the scope's expert metadata, once the constructor has set it."""
    key = experts_key()
    if _core.is_ready(key):
        handle.hold(key)


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
    settings.check_flag("force", force)
    if timeout is not None:
        timeout = settings.check_seconds("timeout", timeout)
    return _close(handle_of(runner), timeout, force=force)


def _close(handle: _core.RunnerHandle, timeout: Optional[float], *, force: bool) -> bool:
    if force or handle.closed:
        return give_up(handle)
    execution = _core.current_execution()
    if execution is not None and execution.runner is handle and execution.step is not None:
        raise StateInUse(
            f"runner '{handle.name}' cannot be closed from within its own {execution.step}(): the rest of "
            "that would run on what is released. Close it afterwards, or with force=True",
            runner=handle.name,
            step=execution.step,
        )
    try:
        with rooms.room("load", handle, timeout=timeout):
            return give_up(handle)
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


def give_up(handle: _core.RunnerHandle) -> bool:
    """Release what ``handle`` holds, at once."""
    scope = handle.scope
    closed = handle.close()
    if closed:
        ownership.vacate(scope)
    return closed


def abandon(runner: Any) -> None:
    """Release what a runner holds whose construction failed, and all that it was given.

    The error's frames refer to the runner, and it would refer to its weights (46 GB were seen).
    """
    handle = find_handle(runner)
    if handle is not None:
        give_up(handle)
    vars(runner).clear()


def mark_as_of(runner: Any, part: Any) -> None:
    """Let ``part``, made by ``runner``'s methods, say whose it is; what another has made stays its."""
    fields = getattr(part, "__dict__", None)
    if fields is not None and _ATTRIBUTE not in fields:
        setattr(part, _ATTRIBUTE, find_handle(runner))


def handle_of(runner: object, argument: str = "runner") -> _core.RunnerHandle:
    """The handle of what a caller gave as ``argument``.

    Raises:
        TypeError: it was not built under the guard.
    """
    try:
        handle = find_handle(runner)
    except Exception:  # its ``__dict__`` is no dict, or raises
        handle = None
    if not isinstance(handle, _core.RunnerHandle):
        raise TypeError(
            f"{argument} must be a ModelRunner that was built under sglang_distguard, not a "
            f"{type(runner).__name__}; call sglang_distguard.install() before constructing it"
        )
    return handle


def _default_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    config = args[0] if args else kwargs.get("model_config")
    role = "-draft" if kwargs.get("is_draft_worker") else ""
    return f"{name_of_model(config)}{role}-{next(_numbers)}"
