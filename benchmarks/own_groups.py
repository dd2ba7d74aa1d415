"""Measures the cost of a runner's own communicators: groups="own" beside groups="share".

    .venv/bin/python benchmarks/own_groups.py [RUNNERS] [RANKS]

It builds the same RUNNERS runners (2-layer Llama, tp_size = RANKS) one after the other in RANKS
processes, twice, and prints what each further runner adds on rank 0. It runs on CPU and gloo; NCCL
communicators are not measured.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def held() -> dict[str, float]:
    """The resources that this process holds now."""
    import gc

    import torch.distributed as dist

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "resident MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


def build(runners: int, groups: Literal["own", "share"]) -> list[dict[str, float]]:
    """Build on this rank; return resources before the first runner and after each, and seconds."""
    import sglang_distguard
    import torch.distributed as dist
    from sglang_distguard.testing import create_model, server_args

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sglang_distguard.install(groups=groups)
    dist.init_process_group("gloo", init_method="env://")
    model = create_model("llama", CACHE / "models")
    seen: list[dict[str, float]] = [{**held(), "seconds": 0.0}]
    kept: list[Any] = []
    for number in range(runners):
        begun = time.perf_counter()
        args = server_args(model, tp_size=size)
        kept.append(sglang_distguard.build_runner(args, name=f"runner {number}", gpu_id=rank))
        seconds = time.perf_counter() - begun
        dist.barrier()
        seen.append({**held(), "seconds": seconds})
    return seen


def main(runners: int, size: int) -> None:
    """Measure and print."""
    import own_groups as this  # by its name, so that the ranks' processes can import it
    from sglang_distguard.testing.ranks import RankRunner

    with RankRunner(Path(__file__).parent) as ranks:
        made = {
            groups: ranks.run(this.build, size, seconds=300, runners=runners, groups=groups)[0]
            for groups in ("own", "share")
        }
    first = made["own"][1]["process groups"], made["share"][1]["process groups"]
    print(f"process groups with one runner: {first[0]:.0f} own, {first[1]:.0f} share")
    print(f"rank 0 of {size}, {runners} runners; mean of what each after the first adds")
    print(f"{'':18}{'own':>10}{'share':>10}{'difference':>12}")
    for what in made["own"][0]:
        added = {
            groups: (
                sum(it[what] for it in seen[2:])
                if what == "seconds"
                else seen[-1][what] - seen[1][what]
            )
            / (runners - 1)
            for groups, seen in made.items()
        }
        own, share = added["own"], added["share"]
        print(f"{what:18}{own:>10.2f}{share:>10.2f}{own - share:>12.2f}")


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]]
    main(*(numbers + [8, 2][len(numbers) :]))
