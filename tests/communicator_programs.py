"""What ranks run in the tests of communicators: whose they are, and what two threads do with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rank_programs import (
    DEADLINE,
    _built,
    again,
    args_of,
    attempt,
    build,
    generated,
    in_threads,
    raise_errors,
    rank,
    start,
)


def forward_in_opposite_order(
    names: Sequence[str], rounds: int, groups: str = "own", unguarded: bool = False
) -> dict[str, list[str]]:
    """Build all, then forward each from a thread of its own; every rank starts them differently.

    ``unguarded`` takes the fix away: shared groups, and nobody sees to the order.
    """
    from sglang_distguard.runner import collective_steps, handle

    start(groups=groups)
    if unguarded:
        for module in (collective_steps, handle):
            setattr(module, "may_overlap", lambda key: True)
    # One after the other: it is the forwards that are looked at.
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
    """A draft over its target's groups: from one thread, and while another thread is in its target."""
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
    """A forward over shared groups waits for another's, and gives up; nobody else is the worse for it."""
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
    """The first runner's groups are being destroyed while another thread builds."""
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
    """The first build asks for a world that the user's is not; then from two threads, in opposite order."""
    start()
    error = attempt(lambda: build("dense", tp_size=1))
    names = ["dense", "experts"] if rank() == 0 else ["experts", "dense"]
    results = in_threads([lambda n=n: build(n) for n in names])
    raise_errors(results)
    return {"error": error, "made": forward_both(dict(zip(names, results, strict=True)))}


def build_with_own_and_shared_groups(order: Sequence[str]) -> dict[str, Any]:
    """A runner of each policy, one after the other; then both forward at once, in opposite order."""
    import sglang_distguard

    start()
    names = {"own": "dense", "share": "experts"}
    built = {}
    for policy in order:
        with sglang_distguard.runner_scope(groups=policy):  # type: ignore[arg-type]
            built[policy] = build(names[policy])
    return {"made": forward_both(built), "groups": len({tp_group(it) for it in built.values()})}


def forward_both(built: dict[str, Any]) -> dict[str, str]:
    """What all generate at once, from a thread each, in opposite order on odd ranks."""
    order = list(built) if rank() % 2 == 0 else list(reversed(built))
    results = in_threads([lambda n=n: generated(built[n]) for n in order])
    raise_errors(results)
    return dict(zip(order, results, strict=True))


def tp_group(runner: Any) -> int:
    """What tells the runner's tensor-parallel group from others."""
    import sglang_distguard
    from sglang_distguard.distributed import coordinators

    with sglang_distguard.activate(runner):
        return id(coordinators.read()["_TP"])


def forward_two_of_one_name() -> dict[str, Any]:
    """Two runners of one name over shared groups; each rank forwards another one first."""
    import sglang_distguard
    import torch.distributed as dist

    start(groups="share")
    built = [build("dense", name="x"), build("dense", name="x", seed=1)]
    made = [generated(it) for it in built]
    with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
        error = attempt(lambda: generated(built[rank() % 2]))
    # Or the first to give up would meet the other in the very forward that it still waits in.
    dist.barrier()
    return {
        "made": made,
        "error": error,
        "after": [late(lambda it=it: generated(it)) for it in built],
    }


def late(work: Callable[[], str]) -> str:
    """Whoever did not wait when the others gave a round up learns of it when it comes, once."""
    from sglang_distguard import AgreementTimeout

    try:
        return work()
    except AgreementTimeout:
        return work()


def build_two_unnamed(delay: float = 0.5) -> list[Any]:
    """Two runners without names over shared groups, in opposite order."""
    import sglang_distguard

    start(groups="share")
    settings = [args_of("dense"), args_of("dense", seed=1)]
    first = threading.Event()

    def one(index: int) -> Any:
        if index != rank() % 2:
            first.wait(delay)
        runner = sglang_distguard.build_runner(settings[index], gpu_id=rank())
        _built.append(runner)
        return generated(runner)

    return in_threads([lambda: one(0), lambda: one(1)])


def be_idle_in_a_pipeline(pause: float) -> str:
    """The last stage waits for the first for longer than groups may take to be created."""
    import sglang_distguard

    start()
    with sglang_distguard.runner_scope(agreement_timeout=pause / 2):
        runner = build("dense", tp_size=1, pp_size=2)
    if rank() == 0:
        time.sleep(pause)
    return generated(runner)


def refuse(policy: str, overrides: dict[str, Any], force: dict[str, Any]) -> dict[str, Any]:
    """What a build with these settings raises; then the ranks build something else.

    ``force``: set after SGLang has checked them, which needs packages that are not here.
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
    """Runners of different widths one after the other, in the scope that the one before has left."""
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


def raise_in_a_forward(policy: str, on: int) -> dict[str, Any]:
    """One rank's forward raises, before its first collective; then a runner that shares is used."""
    start(groups=policy)
    built = {"dense": build("dense"), "experts": build("experts")}
    real = built["dense"].model.forward

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no forward today")

    if rank() == on:
        built["dense"].model.forward = fail_once
    error = attempt(lambda: generated(built["dense"]))
    built["dense"].model.forward = real
    return {
        "error": error,
        "again": attempt(lambda: generated(built["dense"])),
        "other": attempt(lambda: generated(built["experts"])),
        "after": again(["half"]),
    }
