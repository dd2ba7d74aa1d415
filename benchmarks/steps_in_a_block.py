"""Measures what a step costs in a block of ``turn``, without a model's work.

    .venv/bin/python benchmarks/steps_in_a_block.py [STEPS]

Two ranks (tp_size=2) over gloo on a CPU, ``groups="share"``. Rank 0 enters and leaves the with blocks
of ``ModelRunner.forward`` and ``sample`` STEPS times each, five times, in a block; then both ranks
take turns in which nothing is done.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

CACHE = Path(__file__).resolve().parent.parent / ".cache"
BLOCKS, TURNS = 5, 50


def measure(steps: int) -> dict[str, list[float]]:
    """Return microseconds of this thread's CPU for each step, and milliseconds of each turn."""
    import sglang_distguard
    import torch.distributed as dist
    from sglang_distguard.hooks import model_runner
    from sglang_distguard.testing import create_model, server_args

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sglang_distguard.install(groups="share")
    dist.init_process_group("gloo", init_method="env://")
    args = server_args(create_model("llama", CACHE / "models"), tp_size=size)
    runner = sglang_distguard.build_runner(args, name="one", gpu_id=rank)

    def step(name: str) -> float:
        step_of: Any = model_runner._step_of(name)
        begun = time.thread_time()
        for _ in range(steps):
            with step_of(runner):
                pass
        return 1e6 * (time.thread_time() - begun) / steps

    found: dict[str, list[float]] = {"forward": [], "sample": [], "turn": []}
    for _ in range(BLOCKS):
        with sglang_distguard.turn(runner):
            for name in ("forward", "sample") if rank == 0 else ():
                found[name].append(step(name))
    for _ in range(TURNS):
        begun = time.perf_counter()
        with sglang_distguard.turn(runner):
            pass
        found["turn"].append(1e3 * (time.perf_counter() - begun))
    return found


def main(steps: int) -> None:
    """Measure and print."""
    import steps_in_a_block as this  # by its name, so that the ranks' processes can import it
    from sglang_distguard.testing.ranks import RankRunner

    with RankRunner(Path(__file__).parent) as ranks:
        found = ranks.run(this.measure, 2, seconds=300, steps=steps)[0]
    for name, unit in (("forward", "us of a step"), ("sample", "us of a step"), ("turn", "ms")):
        them = found[name]
        print(f"{name}: {statistics.median(them):.2f} ({min(them):.2f} to {max(them):.2f}) {unit}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
