"""What the guard costs one runner: the same runner with and without the hooks, in turn.

    .venv/bin/python benchmarks/forward_overhead.py [ROUNDS]

Prints the ratio guarded / plain of whole generations (one prefill, 31 decodes), round by round paired
so that a drifting machine does not matter, and the cost of reading one scoped global.
"""

from __future__ import annotations

import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import sglang_distguard
from sglang_distguard.testing import create_model, prepare_environment, server_args, steps

STEPS = 31


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main(rounds: int) -> None:
    """Measure and print."""
    prepare_environment()
    model = create_model("llama", Path(".cache/models"))
    sglang_distguard.install()
    runner = sglang_distguard.build_runner(server_args(model), name="only one")
    from sglang.srt.runtime_context import get_exec, get_parallel

    def generate() -> object:
        return steps.generate(runner, steps=STEPS)

    plain, guarded, reads = [], [], {}
    for number in range(rounds + 2):
        sglang_distguard.install()
        with_guard = seconds(generate)
        if number == 0:
            reads["guarded"] = [read_ns(get_parallel), read_ns(get_exec)]
        sglang_distguard.uninstall()
        without = seconds(generate)
        if number == 0:
            reads["plain"] = [read_ns(get_parallel), read_ns(get_exec)]
        if number >= 2:  # the first two warm up
            guarded.append(with_guard)
            plain.append(without)
    ratios = sorted(g / p for g, p in zip(guarded, plain, strict=True))
    print(
        f"{rounds} pairs of generations (2-layer Llama, hidden 64, float32, CPU), {STEPS + 1} forwards each"
    )
    print(f"plain   median {statistics.median(plain) / (STEPS + 1) * 1e3:.3f} ms a forward")
    print(f"guarded median {statistics.median(guarded) / (STEPS + 1) * 1e3:.3f} ms a forward")
    print(
        f"ratio   median {statistics.median(ratios):.4f}, "
        f"quartiles {ratios[rounds // 4]:.4f} and {ratios[3 * rounds // 4]:.4f}"
    )
    for what, (parallel, execution) in reads.items():
        print(f"{what:8} get_parallel() {parallel:.0f} ns, get_exec() {execution:.0f} ns")


def read_ns(function: Callable[[], object]) -> float:
    """Nanoseconds of one call."""
    return min(timeit.repeat(function, number=100_000, repeat=5)) / 100_000 * 1e9


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
