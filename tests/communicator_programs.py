"""Programs for ranks in the tests of communicators: each runner's own, and two threads' use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from rank_programs import (
    DEADLINE,
    _built,
    again,
    args_of,
    attempt,
    build,
    generated,
    in_threads,
    noting_asks,
    raise_errors,
    rank,
    start,
)


def forward_in_opposite_order(
    names: Sequence[str], rounds: int, groups: str = "own", unguarded: bool = False
) -> dict[str, list[str]]:
    """Build all, then forward each from its own thread; odd ranks start these in opposite order.

    ``unguarded`` takes the fix away: shared groups, and no code orders the forwards.
    """
    from sglang_distguard.runner import collective_steps, handle

    start(groups=groups)
    if unguarded:
        for module in (collective_steps, handle):
            setattr(module, "may_overlap", lambda key: True)
    # Built one after the other, because the tests are about the forwards.
    built = {name: build(name) for name in sorted(names)}
    order = list(names) if rank() % 2 == 0 else list(reversed(names))
    together = threading.Barrier(len(order))

    def forward(name: str) -> list[str]:
        together.wait()
        return [generated(built[name], steps=1) for _ in range(rounds)]

    results = in_threads([lambda n=n: forward(n) for n in order])
    raise_errors(results)
    return dict(zip(order, results, strict=True))


def draft_beside_target(step: str) -> dict[str, Any]:
    """Use a draft over its target's groups: from one thread, and while another is in its target."""
    import sglang_distguard

    start()
    target = build("experts")
    draft: Any = sglang_distguard.build_runner(
        args_of("dense"), name="draft", gpu_id=rank(), target=target
    )
    _built.append(draft)
    made = {"experts": generated(target), "dense": generated(draft)}
    inside, leave = threading.Event(), threading.Event()
    forward = target.model.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return forward(*args, **kwargs)

    steps: dict[str, Callable[[], Any]] = {
        "forward of the draft": lambda: draft.forward(forward_batch=None),
        "sample": lambda: target.sample(None, None),
        "weight update": lambda: target.weight_updater.update_weights_from_disk("no", "auto"),
    }
    target.model.forward = held
    ended: list[Any] = []
    first = threading.Thread(
        target=lambda: ended.append(attempt(lambda: generated(target))), name="first"
    )
    first.start()
    assert inside.wait(60)
    refused = attempt(steps[step])
    leave.set()
    first.join()
    target.model.forward = forward
    return {
        "made": made,
        "refused": refused,
        "first": ended[0] is None,
        "later": [attempt(lambda it=it: generated(it)) for it in (target, draft)],
        "after": again(["half"]),
    }


def queue_behind_a_long_step() -> dict[str, Any]:
    """Let a forward over shared groups time out behind another runner's; the others still work."""
    import sglang_distguard

    start(groups="share")
    built = {name: build(name) for name in ("dense", "experts")}
    inside, leave = threading.Event(), threading.Event()
    forward = built["experts"].model.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return forward(*args, **kwargs)

    built["experts"].model.forward = held
    made: list[str] = []
    long = threading.Thread(target=lambda: made.append(generated(built["experts"])))
    long.start()
    assert inside.wait(60)
    with sglang_distguard.runner_scope(timeout=0.5):
        error = attempt(lambda: generated(built["dense"]))
    leave.set()
    long.join()
    built["experts"].model.forward = forward
    return {"error": error, "made": made, "after": generated(built["dense"])}


def close_beside_a_build() -> dict[str, Any]:
    """Build in one thread while another is destroying the first runner's groups."""
    import sglang_distguard
    from sglang_distguard.distributed import owned_groups

    start()
    first = build("dense")
    discard = owned_groups.destroy_unless_leased
    inside, leave = threading.Event(), threading.Event()

    def held(*args: Any) -> None:
        inside.set()
        assert leave.wait(60)
        discard(*args)

    owned_groups.destroy_unless_leased = held
    closing = threading.Thread(target=lambda: sglang_distguard.close(first))
    closing.start()
    assert inside.wait(60)
    owned_groups.destroy_unless_leased = discard
    second = build("experts")
    leave.set()
    closing.join()
    return {"experts": generated(second), **again(["half"])}


def build_after_a_refused_one() -> dict[str, Any]:
    """Ask for a world unlike the user's; then build from two threads, in opposite order."""
    start()
    error = attempt(lambda: build("dense", tp_size=1))
    names = ["dense", "experts"] if rank() == 0 else ["experts", "dense"]
    results = in_threads([lambda n=n: build(n) for n in names])
    raise_errors(results)
    return {"error": error, "made": forward_both(dict(zip(names, results, strict=True)))}


def build_with_own_and_shared_groups(order: Sequence[str]) -> dict[str, Any]:
    """Build a runner of each policy in turn; then forward both at once, in opposite order."""
    import sglang_distguard

    start()
    names = {"own": "dense", "share": "experts"}
    built = {}
    for policy in order:
        with sglang_distguard.runner_scope(groups=policy):  # type: ignore[arg-type]
            built[policy] = build(names[policy])
    return {
        "made": forward_both(built),
        "groups": len({id(tp_coordinator(it)) for it in built.values()}),
    }


def forward_both(built: dict[str, Any]) -> dict[str, str]:
    """Generate with all at once, from one thread each, in opposite order on odd ranks."""
    order = list(built) if rank() % 2 == 0 else list(reversed(built))
    results = in_threads([lambda n=n: generated(built[n]) for n in order])
    raise_errors(results)
    return dict(zip(order, results, strict=True))


def tp_coordinator(runner: Any) -> Any:
    """The GroupCoordinator of the runner's tensor-parallel group."""
    import sglang_distguard
    from sglang_distguard.distributed import coordinators

    with sglang_distguard.activate(runner):
        return coordinators.read()["_TP"]


def forward_two_of_one_name() -> dict[str, Any]:
    """Build two runners of one name over shared groups; each rank forwards another one first."""
    import sglang_distguard
    import torch.distributed as dist

    start(groups="share")
    built = [build("dense", name="x"), build("dense", name="x", seed=1)]
    made = [generated(it) for it in built]
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: generated(built[rank() % 2]))
    # Without it, the first rank that times out would join the forward where the other still waits.
    dist.barrier()
    return {
        "made": made,
        "error": error,
        "after": [late(lambda it=it: generated(it)) for it in built],
    }


def late(work: Callable[[], str]) -> str:
    """Retry ``work`` once: a rank that was absent when the others timed out gets one late error."""
    from sglang_distguard import AgreementTimeout

    try:
        return work()
    except AgreementTimeout:
        return work()


def build_two_unnamed() -> list[Any]:
    """Build two runners without names over shared groups, in opposite order."""
    import sglang_distguard

    start(groups="share")
    settings = [args_of("dense"), args_of("dense", seed=1)]
    has_asked = threading.Event()  # for the runner that this rank builds first

    def one(index: int) -> Any:
        if index != rank() % 2:
            assert has_asked.wait(60)
        runner = sglang_distguard.build_runner(settings[index], gpu_id=rank())
        _built.append(runner)
        return generated(runner)

    with noting_asks(lambda _name: has_asked.set()):
        return in_threads([lambda: one(0), lambda: one(1)])


def be_idle_in_a_pipeline(deadline: float, pause: float) -> str:
    """The last stage waits ``pause`` for the first: for longer than groups may take to be created.

    The pause puts no threads in order; the deadline is long enough for a build on a busy machine.
    """
    import sglang_distguard

    assert pause > deadline
    start()
    with sglang_distguard.runner_scope(agreement_timeout=deadline):
        runner = build("dense", tp_size=1, pp_size=2)
    if rank() == 0:
        time.sleep(pause)
    return generated(runner)


def refuse(policy: str, overrides: dict[str, Any], force: dict[str, Any]) -> dict[str, Any]:
    """Return what a build with these settings raises; then build another runner.

    ``force``: settings that are set after SGLang's checks, which need packages that are not
    installed here.
    """
    import msgspec
    from sglang.srt.runtime_context import get_server_args
    from sglang_distguard.api import building

    start(groups=policy)
    real = building._process_configurations

    def configure() -> None:
        args: Any = get_server_args()
        for name, value in force.items():
            msgspec.structs.force_setattr(args, name, value)

    building._process_configurations = lambda: [*real(), configure]
    error = attempt(lambda: build("dense", **overrides))
    building._process_configurations = real
    return {"error": error, "after": again(["experts"])}


def build_in_other_layouts(policy: str, closed: bool) -> list[str]:
    """Build runners of different widths in turn, each in the scope that the previous one left."""
    import gc

    import sglang_distguard

    start(groups=policy)
    made = []
    layouts: list[dict[str, Any]] = [{}, {"tp_size": 1, "pp_size": 2}, {}]
    for overrides in layouts:
        runner = build("dense", **overrides)
        made.append(generated(runner))
        if closed:
            sglang_distguard.close(runner)
        _built.remove(runner)
        del runner
        gc.collect()
        if policy == "share":
            sglang_distguard.teardown()
    return made


def use_destroyed_groups() -> dict[str, Any]:
    """Begin collectives over the groups of a closed runner, as a forward does that comes late."""
    import sglang_distguard
    import torch
    import torch.distributed as dist

    start(groups="own")
    runner = build("dense")
    coordinator = tp_coordinator(runner)
    sglang_distguard.close(runner)
    coordinator.destroy()  # again, as SGLang may
    number = torch.ones(1)
    errors = {
        "all_reduce": attempt(lambda: coordinator.all_reduce(number)),
        "broadcast": attempt(lambda: dist.broadcast(number, 0, group=coordinator.cpu_group)),
        "broadcast_object": attempt(lambda: coordinator.broadcast_object([1], 0)),
    }
    return {"errors": errors, "number": number.item()}


def raise_in_a_forward(policy: str, on: int, is_late: bool = False) -> dict[str, Any]:
    """Raise in one rank's forward, before its first collective; then use both runners.

    Args:
        policy: of groups.
        on: the rank.
        is_late: the other rank comes to its first collective when its groups are destroyed.
    """
    from registry_calls import until
    from sglang_distguard.distributed import coordinators

    start(groups=policy)
    built = {"dense": build("dense"), "experts": build("experts")}
    real = built["dense"].model.forward

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no forward today")

    coordinator = tp_coordinator(built["dense"])

    def come_late(*args: Any, **kwargs: Any) -> Any:
        until(lambda: not coordinators.is_alive(coordinator))
        return real(*args, **kwargs)

    if rank() == on:
        built["dense"].model.forward = fail_once
    elif is_late:
        built["dense"].model.forward = come_late
    error = attempt(lambda: generated(built["dense"]))
    built["dense"].model.forward = real
    return {
        "error": error,
        "again": attempt(lambda: generated(built["dense"])),
        "other": attempt(lambda: generated(built["experts"])),
        "after": again(["half"]),
    }


def steps_of_a_block() -> dict[str, Any]:
    """Steps of a block's runner and of another one; one that is dropped where it would be left.

    Returns the generations, which steps of each were not native, what a thread of the block
    generates when another thread has dropped a step, and whose code a method without a phase runs.
    """
    import sglang_distguard
    from sglang_distguard import _core
    from sglang_distguard.hooks import model_runner
    from sglang_distguard.runner.handle import handle_of

    start(groups="share")
    built = {name: build(name) for name in ("dense", "experts")}
    in_python: dict[str, list[str]] = {}
    made: dict[str, str] = {}
    hooks: Any = model_runner
    real = hooks.step_among_ranks
    step_of = hooks._step_of("forward")

    def noted(handle: Any, step: str, *args: Any, **kwargs: Any) -> Any:
        in_python[handle.name].append(step)
        return real(handle, step, *args, **kwargs)

    with (
        mock.patch.object(hooks, "step_among_ranks", noted),
        sglang_distguard.turn(built["dense"]),
        ThreadPoolExecutor(1) as pool,
    ):
        for name, runner in built.items():
            in_python[name] = []
            made[name] = generated(runner)
        step = step_of(built["dense"])
        assert isinstance(step, _core.StepInTurn)
        step.__enter__()
        del step  # as an interrupt between the body's end and the step's
        made["by another thread"] = pool.submit(generated, built["dense"]).result()
    with hooks._step_of("update_model_fields")(built["dense"]):
        now = _core.current_execution()
        is_its_own = now is not None and now.runner is handle_of(built["dense"])
    return {"made": made, "in python": in_python, "is its own": is_its_own}
