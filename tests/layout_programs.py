"""Programs for ranks in the tests of layouts: which groups SGLang makes, and for which runner."""

from __future__ import annotations

import os
from typing import Any

from rank_programs import args_of, build, generated, in_threads, raise_errors, rank, start


def structure() -> dict[str, list[Any]]:
    """Global of `parallel_state` -> ranks of its group, and the first global with that group."""
    from sglang.srt.distributed import parallel_state
    from sglang_distguard.distributed import coordinators

    found: dict[str, list[Any]] = {}
    firsts: dict[int, str] = {}
    for name in coordinators.FIELDS:
        # This also runs without the guard, where these are plain globals.
        accessor = vars(parallel_state).get(f"_distguard_scoped_{name}")
        coordinator = vars(parallel_state)[name] if accessor is None else accessor.value
        if coordinator is not None:
            first = firsts.setdefault(id(coordinator), name)
            found[name] = [list(coordinator.ranks), first]
    return found


def plain(name: str, overrides: dict[str, Any]) -> dict[str, list[Any]]:
    """The groups of one runner as plain SGLang makes them, without the guard."""
    from sglang_distguard.testing import build as plain_build

    plain_build(
        args_of(name, **overrides),
        gpu_id=rank(),
        world_rank=rank(),
        port=int(os.environ["MASTER_PORT"]),
    )
    return structure()


def owned(name: str, overrides: dict[str, Any], forwards: bool) -> dict[str, Any]:
    """Build two runners of one layout at once, in opposite order.

    Returns what each has, and what ``close`` leaves.
    """
    import sglang_distguard
    import torch.distributed.distributed_c10d as c10d

    start()
    build(name, name="before")
    before = set(c10d._world.pg_names.values())
    names = ["a", "b"] if rank() % 2 == 0 else ["b", "a"]
    built = in_threads([lambda it=it: build(name, name=it, **overrides) for it in names])
    raise_errors(built)
    runners = dict(zip(names, built, strict=True))
    found: dict[str, Any] = {"structures": [], "members": [], "digests": []}
    for runner in (runners["a"], runners["b"]):
        with sglang_distguard.activate(runner):
            found["structures"].append(structure())
            found["members"].append(process_groups())
    if forwards:
        made = in_threads([lambda it=it: (it, generated(runners[it])) for it in names])
        raise_errors(made)
        found["digests"] = [dict(made)["a"], dict(made)["b"]]
    made_by_both = set(c10d._world.pg_names.values()) - before
    found["of no runner"] = sorted(made_by_both - {it for both in found["members"] for it in both})
    for runner in runners.values():
        sglang_distguard.close(runner)
    found["left"] = sorted(set(c10d._world.pg_names.values()) - before)
    return found


def process_groups() -> list[str]:
    """Names of all process groups of the current scope's coordinators and of its world."""
    import torch.distributed.distributed_c10d as c10d
    from sglang.srt.runtime_context import get_parallel
    from sglang_distguard.distributed import coordinators

    found = [it for it in coordinators.read().values() if it is not None]
    found.append(get_parallel().world_group)
    return sorted({c10d._world.pg_names[it] for made in found for it in coordinators.parts(made)})


def count_groups(name: str, overrides: dict[str, Any], shares: bool) -> dict[str, Any]:
    """Build two runners of one layout; ``shares=False`` makes each group of one member anew.

    Returns how many groups of one and of several members each has, digests, and what is left after
    the first and after both are closed.
    """
    import sglang_distguard
    import torch.distributed.distributed_c10d as c10d
    from sglang_distguard.distributed.ranks.creation import Creation

    if not shares:
        Creation.lone = lambda self, key, make: make()  # type: ignore[method-assign]
    start()
    build(name, name="before")
    before = set(c10d._world.pg_names.values())
    found: dict[str, Any] = {"one": [], "several": [], "digests": [], "left": []}
    runners = [build(name, name=it, **overrides) for it in ("a", "b")]
    for runner in runners:
        with sglang_distguard.activate(runner):
            mine = set(process_groups())
        sizes = [it.size() for it, known in c10d._world.pg_names.items() if known in mine]
        found["one"].append(sizes.count(1))
        found["several"].append(len(sizes) - sizes.count(1))
    for runner in runners:
        found["digests"].append(generated(runner))
        sglang_distguard.close(runner)
        found["left"].append(len(set(c10d._world.pg_names.values()) - before))
    return found
