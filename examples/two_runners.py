"""Two models over all ranks of a torchrun job, built and run by two threads of every rank.

    torchrun --nproc-per-node 2 examples/two_runners.py [MODEL MODEL]

Each rank uses the GPU numbered LOCAL_RANK, or one CPU core where there is no GPU. Without
arguments, small models are made in .cache/. Ranks start their threads in different orders, and the
guard makes them agree.
"""

from __future__ import annotations

import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sglang_distguard
import torch
import torch.distributed as dist
from sglang_distguard.testing import create_model, generate, prepare_environment, server_args

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))


def main(models: list[str]) -> None:
    """Build one runner of every model, generate with all of them at once, and compare the ranks."""
    on_gpu = torch.cuda.is_available()
    prepare_environment(ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not models:
        models = [str(create_model(name, Path(".cache/models"))) for name in ("llama", "mixtral")]

    sglang_distguard.install(agreement_timeout=60)
    # Your program makes the world, before the first runner; its size is tp_size times pp_size.
    dist.init_process_group("nccl" if on_gpu else "gloo")

    def build_and_run(number: int) -> str:
        # By name, ranks know which runners belong together, whichever is first on each rank.
        runner = sglang_distguard.build_runner(
            server_args(models[number], tp_size=SIZE), name=f"model {number}", gpu_id=LOCAL_RANK
        )
        made = generate(runner, activate=sglang_distguard.activate)
        sglang_distguard.close(runner)
        return f"model {number}: {made.tokens}"

    order = random.sample(range(len(models)), len(models))
    with ThreadPoolExecutor() as threads:
        lines = sorted(threads.map(build_and_run, order))

    all_lines: list[list[str]] = [[] for _ in range(SIZE)]
    dist.all_gather_object(all_lines, lines)
    if RANK == 0:
        print("\n".join(lines))
        print(f"the same on {SIZE} ranks: {all(it == lines for it in all_lines)}", flush=True)
    sglang_distguard.teardown()
    dist.destroy_process_group()  # this program made it, so it destroys it


if __name__ == "__main__":
    main(sys.argv[1:])
