"""Measures the cost of agreeing as ranks are added: store round trips per runner and rank, time.

    .venv/bin/python benchmarks/agreement_scale.py [RUNNERS]

No model is built. For RUNNERS runners one after the other, every rank asks, takes its turn and
confirms, over a real TCPStore that rank 0 serves. The ranks are first real processes, each with a
gloo world, and then threads of one process, each with its own connections. Times are ratios to two
ranks of the same kind.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

PROCESSES = (2, 4, 8, 16)
THREADS = (2, 4, 8, 16, 32, 64, 128)


class Counted:
    """A store that counts the requests that go through it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name == "has_extended_api":  # sends no request
            return method

        def call(*args: Any) -> Any:
            self.requests += 1
            return method(*args)

        return call


def agree(ranks: Any, runners: int) -> dict[str, float]:
    """Agree with the other ranks on ``runners`` runners; return requests and seconds of each."""
    from sglang_distguard import runner_scope
    from sglang_distguard.distributed.ranks import agreement

    store, reading = Counted(ranks.store), Counted(ranks.reading)
    ranks = replace(ranks, store=store, reading=reading)
    with runner_scope(agreement_timeout=300):
        begun = 0.0
        for number in range(-1, runners):
            if number == 0:  # the one before was for warm-up
                begun, store.requests, reading.requests = time.perf_counter(), 0, 0
            with agreement.building():
                with agreement.turn(ranks, f"runner {number}", {"number": number}, keep=True):
                    pass
                agreement.built()
        seconds = time.perf_counter() - begun
    return {
        "requests": (store.requests + reading.requests) / runners,
        "seconds": seconds / runners,
    }


def in_process(runners: int) -> dict[str, float]:
    """Run ``agree`` as one of several processes."""
    import torch.distributed as dist
    from sglang_distguard.distributed.ranks.log import open_ranks

    dist.init_process_group("gloo", init_method="env://")
    ranks = open_ranks(dist.distributed_c10d._get_default_group())
    assert ranks is not None
    return agree(ranks, runners)


def in_threads(size: int, runners: int) -> list[dict[str, float]]:
    """Run ``agree`` on ``size`` ranks that are threads of this process."""
    from sglang_distguard.testing.simulated import serve, simulated

    server = serve()
    ranks = simulated(size, server)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        results[rank] = agree(ranks[rank], runners)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def report(kind: str, measured: Iterable[tuple[int, list[dict[str, float]]]]) -> None:
    """Print one table."""
    print(f"\n{kind:16} requests per runner and rank      time per runner")
    print("ranks            rank 0  mean   most             ratio to 2 ranks  ms")
    first = 0.0
    for size, results in measured:
        requests = [result["requests"] for result in results]
        seconds = max(result["seconds"] for result in results)
        first = first or seconds
        mean, most = statistics.mean(requests), max(requests)
        print(
            f"{size:<16} {requests[0]:<7.1f} {mean:<6.1f} {most:<16.1f} "
            f"{seconds / first:<17.1f} {seconds * 1e3:.1f}",
            flush=True,
        )


def main(runners: int) -> None:
    """Measure and print."""
    import agreement_scale as this  # by its name, so that the ranks' processes can import it
    from sglang_distguard.testing.ranks import RankRunner

    cores = len(os.sched_getaffinity(0))
    print(f"{runners} runners, one host, {cores} cores for all ranks together")
    with RankRunner(Path(__file__).parent) as ranks:
        report(
            "processes",
            ((size, ranks.run(this.in_process, size, runners=runners)) for size in PROCESSES),
        )
    report("threads", ((size, in_threads(size, runners)) for size in THREADS))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
