"""Programs for ranks in the tests of blocks of ``sglang_distguard.turn``, and of ranks that end or fall silent in one."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from communicator_programs import tp_coordinator
from rank_programs import (
    DEADLINE,
    _built,
    again,
    attempt,
    build,
    error_facts,
    generated,
    in_threads,
    leave_behind,
    raise_errors,
    rank,
    shared_file,
    start,
)


def block(runner: Any, steps: int = 1) -> str:
    """Generate in one block: forwards and samples."""
    import sglang_distguard

    with sglang_distguard.turn(runner) as given:
        assert given is runner
        return generated(runner, steps=steps)


def ranks_of_world() -> Any:
    from sglang_distguard.distributed import world

    ranks = world.ranks()
    assert ranks is not None
    return ranks


def raising_on(on: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that raises on one rank, before its first collective."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if rank() == on:
            raise OSError("no forward today")
        return real(*args, **kwargs)

    return forward


@contextmanager
def noted_turns() -> Iterator[list[str]]:
    """Give the names of the steps for which turns are taken."""
    from sglang_distguard.distributed.ranks import agreement

    taken: list[str] = []
    real = agreement.turn

    def noted(ranks: Any, what: str, *args: Any, **kwargs: Any) -> Any:
        taken.append(what.rpartition(", ")[2])
        return real(ranks, what, *args, **kwargs)

    with mock.patch.object(agreement, "turn", noted):
        yield taken


def blocks_in_opposite_order(
    names: Sequence[str], rounds: int, mixed: bool = False, groups: str = "share"
) -> dict[str, list[str]]:
    """Generate in blocks from one thread for each runner; odd ranks start these in opposite order.

    ``mixed``: every other generation takes turns for its single steps.
    """
    start(groups=groups)
    built = {name: build(name) for name in sorted(names)}
    order = list(names) if rank() % 2 == 0 else list(reversed(names))
    together = threading.Barrier(len(order))

    def use(name: str) -> list[str]:
        together.wait()
        return [
            generated(built[name], steps=1) if mixed and number % 2 else block(built[name])
            for number in range(rounds)
        ]

    results = in_threads([lambda n=n: use(n) for n in order])
    raise_errors(results)
    return dict(zip(order, results, strict=True))


class Counting:
    """A store that counts its requests, but those of signs of life, whose number is one of time."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not callable(value) or name == "has_extended_api":
            return value

        def counted(*args: Any) -> Any:
            if not str(args[0]).startswith("alive/"):
                self.requests += 1
            return value(*args)

        return counted


def count_requests(generations: int) -> dict[str, int]:
    """The requests of this rank for a forward and a sample; for many of both, also in a block."""
    import sglang_distguard
    import torch.distributed as dist

    start(groups="share")
    runner = build("dense")
    ranks = ranks_of_world()
    counting = Counting(ranks.store)
    object.__setattr__(ranks, "store", counting)

    def requests(work: Callable[[], Any]) -> int:
        dist.barrier()
        before = counting.requests
        work()
        dist.barrier()
        return counting.requests - before

    def pair() -> None:
        generated(runner, steps=0)

    def many() -> None:
        for _ in range(generations):
            pair()

    def in_a_block() -> None:
        with sglang_distguard.turn(runner):
            many()

    pair()
    counted = {
        "pair": requests(pair),
        "block": requests(in_a_block),
        "many": requests(many),
    }
    object.__setattr__(ranks, "store", counting._store)
    return counted


def raise_in_a_block(where: str, on: int) -> dict[str, Any]:
    """Raise on one rank in a block, in different places; then use both runners."""
    import sglang_distguard

    start(groups="share")
    built = {"dense": build("dense"), "experts": build("experts")}
    failing = built["experts" if where.startswith("another") else "dense"]

    def raise_within() -> None:
        if where in ("user code", "an interrupt"):
            if rank() == on:
                raise KeyboardInterrupt if where == "an interrupt" else OSError("no forward today")
            return
        forward = raising_on(on, failing.model.forward)
        with mock.patch.object(failing.model, "forward", forward):
            if where.endswith("caught"):
                attempt(lambda: generated(failing, steps=1))
            elif where == "an inner block":
                block(failing)
            else:
                generated(failing, steps=1)

    error: Any = None
    try:
        with sglang_distguard.turn(built["dense"]):
            generated(built["dense"], steps=1)
            raise_within()
    except BaseException as caught:
        error = error_facts(caught)
    return {
        "error": error,
        "again": attempt(lambda: generated(built["dense"])),
        "other": attempt(lambda: generated(built["experts"])),
        "after": again(["half"]),
    }


def step_in_an_ended_block(on: int) -> dict[str, Any]:
    """Raise on one rank in a block; on the other, call another runner when the turn is ended.

    Its own groups take turns, as on GPUs.
    """
    import sglang_distguard
    from registry_calls import until
    from sglang_distguard.distributed import coordinators
    from sglang_distguard.hooks import parallel_state
    from sglang_distguard.runner import collective_steps, handle

    start(groups="own")
    error: Any = None
    with ExitStack() as stack:
        for module in (collective_steps, handle, parallel_state):
            stack.enter_context(mock.patch.object(module, "may_overlap", return_value=False))
        built = {"dense": build("dense"), "experts": build("experts")}
        coordinator = tp_coordinator(built["dense"])
        try:
            with sglang_distguard.turn(built["dense"]):
                generated(built["dense"], steps=1)
                if rank() == on:
                    raise OSError("no forward today")
                until(lambda: not coordinators.is_alive(coordinator))
                generated(built["experts"], steps=1)
        except Exception as caught:
            error = error_facts(caught)
    return {
        "error": error,
        "again": attempt(lambda: generated(built["dense"])),
        "after": again(["half"]),
    }


def nest_blocks() -> dict[str, Any]:
    """Blocks in blocks, of the same runner and another, and steps of another in a block."""
    import sglang_distguard

    start(groups="share")
    dense, experts = build("dense"), build("experts")
    with noted_turns() as taken, sglang_distguard.turn(dense):
        made = [block(dense), block(experts), generated(experts, steps=1)]
        with sglang_distguard.turn(experts), sglang_distguard.turn(dense):
            made.append(generated(dense, steps=1))
    return {"made": made, "taken": taken}


def blocks_without_turns() -> dict[str, Any]:
    """Blocks of runners whose steps take no turns; return for what turns were taken."""
    import sglang_distguard

    start()
    dense = build("dense")
    with noted_turns() as taken, sglang_distguard.turn(dense):
        made = [block(dense), generated(dense, steps=1)]
    with sglang_distguard.turn(dense):
        made.append(generated(build("experts"), steps=1))
        closed = sglang_distguard.close(dense)
    _built.remove(dense)
    return {"made": made, "taken": taken, "closed": closed}


def misuse_blocks() -> dict[str, Any]:
    """Build and close within a block, and blocks of what is no runner, or of a closed one."""
    import sglang_distguard
    import torch

    start(groups="share")
    dense, experts = build("dense"), build("experts")
    refused: dict[str, Any] = {}
    with sglang_distguard.turn(dense):
        before = generated(dense, steps=1)
        refused["build"] = attempt(lambda: build("half"))
        refused["close"] = attempt(lambda: sglang_distguard.close(dense))
        generated(experts, steps=1)
        refused["close another's"] = attempt(lambda: sglang_distguard.close(experts))
        after = generated(dense, steps=1)
    layer: Any = torch.nn.Linear(1, 1)
    refused["no runner"] = attempt(lambda: sglang_distguard.turn(layer))
    made = [before, after, *again(["half"]).values()]
    sglang_distguard.close(experts)
    _built.remove(experts)
    refused["closed"] = attempt(lambda: sglang_distguard.turn(experts).__enter__())
    with sglang_distguard.turn(dense):
        closed = sglang_distguard.close(dense, force=True)
    _built.remove(dense)
    return {"refused": refused, "made": made, "closed": closed, "later": again(["mixture"])}


def second_threads(what: str) -> dict[str, Any]:
    """While a thread is in a block, another one wants a turn; the block calls that step again."""
    import sglang_distguard

    start(groups="share")
    dense, experts = build("dense"), build("experts")
    alive = ranks_of_world().alive
    order: list[str] = []
    made: list[Any] = []
    inside = threading.Event()

    def second() -> None:
        assert inside.wait(60)
        runner = experts if what.endswith("another runner") else dense
        made.append(block(runner) if what.startswith("a block") else generated(runner, steps=1))
        order.append("second")

    thread = threading.Thread(target=second)  # outside: what a block starts is part of it
    thread.start()
    with sglang_distguard.turn(dense):
        made.append(generated(dense, steps=1))
        inside.set()
        while not any(it.stage == "begin" for it in list(alive._flights.values())):
            thread.join(0.01)
        made.append(generated(dense, steps=1))
        order.append("block")
    thread.join()
    return {"made": made, "order": order}


def threads_of_a_block() -> dict[str, Any]:
    """Threads that a block has started: one at a time computes in its turn, or is refused."""
    import sglang_distguard

    start(groups="share")
    dense, experts = build("dense"), build("experts")
    with sglang_distguard.turn(dense), ThreadPoolExecutor(1) as pool:
        made = [pool.submit(generated, it, 1).result() for it in (dense, experts)]
    inside, leave = threading.Event(), threading.Event()
    real = experts.model.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert leave.wait(60)
        return real(*args, **kwargs)

    first: list[Any] = []
    error: Any = None
    refused: Any = None
    thread = threading.Thread(
        target=lambda: first.append(attempt(lambda: generated(experts, steps=1)))
    )
    with mock.patch.object(experts.model, "forward", held):
        try:
            with sglang_distguard.turn(dense):
                thread.start()
                assert inside.wait(60)
                refused = attempt(lambda: generated(dense, steps=1))
        except Exception as caught:
            error = error_facts(caught)
        leave.set()
        thread.join()
    return {
        "made": made,
        "refused": refused,
        "error": error,
        "again": attempt(lambda: generated(dense)),
        "after": again(["half"]),
    }


def tasks_of_a_block() -> dict[str, Any]:
    """Tasks of asyncio that a block makes: one computes in it, one when it is over."""
    import sglang_distguard

    start(groups="share")
    dense = build("dense")

    async def main() -> list[str]:
        over = asyncio.Event()

        async def within() -> str:
            return generated(dense, steps=1)

        async def later() -> str:
            await over.wait()
            return generated(dense, steps=1)

        with sglang_distguard.turn(dense):
            task = asyncio.create_task(later())
            made = [await asyncio.create_task(within())]
        over.set()
        return [*made, await task]

    with noted_turns() as taken:
        made = asyncio.run(main())
    return {"made": made, "taken": taken}


def end_a_rank_in_a_block(how: str, on: int) -> dict[str, Any]:
    """One rank dies, or stops, in a block; the others hear it in theirs and in line for a turn."""
    import sglang_distguard
    from sglang_distguard.distributed.ranks import agreement

    start(groups="share")
    built = {"dense": build("dense"), "experts": build("experts")}
    alive = ranks_of_world().alive
    inside = threading.Event()
    forward = built["dense"].model.forward

    def in_the_block(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        # All ranks have asked for the other runner's turn, which waits for this one.
        while not any(it.stage == "begin" for it in list(alive._flights.values())):
            time.sleep(0.01)
        if rank() != on:
            return forward(*args, **kwargs)
        shared_file("ended new").write_text(str(os.getpid()))
        shared_file("ended new").rename(shared_file("ended"))
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        raise AssertionError("this rank goes on")

    built["dense"].model.forward = in_the_block
    real = agreement._await

    def patient(ask: Any, stage: str, timeout: float) -> None:
        real(ask, stage, 20 * DEADLINE)

    def use(name: str) -> Any:
        with sglang_distguard.runner_scope(agreement_timeout=DEADLINE):
            if name == "dense":
                return attempt(lambda: block(built[name]))
            assert inside.wait(60)
            return attempt(lambda: generated(built[name], steps=1))

    # A wait for its own deadline would take far longer than until a rank is silent.
    with mock.patch.object(agreement, "_await", patient):
        heard = in_threads([lambda n=n: use(n) for n in built])
    for runner in built.values():
        sglang_distguard.close(runner)
    _built.clear()
    built.clear()
    leave_behind(on)
    if how == "stop":
        os.kill(int(shared_file("ended").read_text()), signal.SIGKILL)
    return {"heard": heard, "after": again(["experts"])}


def be_slow_in_a_block(on: int, deadline: float) -> dict[str, Any]:
    """One rank computes in a block for more than two deadlines, and beats."""
    import sglang_distguard

    start(groups="share")
    dense = build("dense")
    alive = ranks_of_world().alive
    real = dense.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        if rank() == on:
            began = alive.beats
            while alive.beats < began + 20:  # there are eight in a deadline
                time.sleep(0.01)
        return real(*args, **kwargs)

    with (
        mock.patch.object(dense.model, "forward", slow),
        sglang_distguard.runner_scope(agreement_timeout=deadline),
    ):
        made = block(dense, steps=0)
    return {"made": made, "again": block(dense, steps=0)}


def fail_beside_a_wait_that_nothing_ends(on: int) -> dict[str, Any]:
    """One rank raises in its block; the other waits in its own as for a kernel of a GPU."""
    import sglang_distguard
    from sglang_distguard.distributed import owned_groups

    start(groups="share")
    dense = build("dense")
    real = owned_groups.destroy_communicators
    broken = threading.Event()
    by: list[str] = []

    def noted(handle: Any, why: str) -> None:
        by.append(threading.current_thread().name)
        real(handle, why)
        broken.set()

    def work() -> None:
        with sglang_distguard.turn(dense):
            if rank() == on:
                raise OSError("no block today")
            assert broken.wait(60)

    with mock.patch.object(owned_groups, "destroy_communicators", noted):
        error = attempt(work)
    return {"error": error, "by": by[0], "after": again(["half"])}
