"""200 cycles of open, serve, close; after each, what the process holds is compared.

    .venv/bin/python verify/engine_cycles.py [--cycles 200] [--warm-up 20]

Exit code 1: a wrong token, or after any cycle more threads, descriptors, files in the temporary
folder or in /dev/shm, scopes, runners, tensors or bytes of tensors than after the warm-up; or
memory that grows by more than `GROWTH` for each cycle, over the second half of the cycles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from engines_common import KINDS, MANY, QUESTIONS, Answers, Left, answers_alone, begin, machine
from tqdm import tqdm

#: MiB for each cycle. An engine of these models has 1.5 MiB of weights and cache: one in fifty kept
#: would be more. Less than that is the allocator's: tensors are counted one by one.
GROWTH = 0.03


def cycle(number: int, alone: list[Answers]) -> None:
    """Open an engine, ask it everything at once and a stream, and close it."""
    import sglang_distguard as dg

    which = number % len(KINDS)
    with dg.Engine(server_args=KINDS[which].args(0), name="cycle", start_timeout=MANY) as engine:
        answers = engine.generate(
            input_ids=[list(it.prompt) for it in QUESTIONS],
            sampling_params=[it.params() for it in QUESTIONS],
        )
        *_, last = engine.generate(**QUESTIONS[0].given(), stream=True)
    found = [tuple(it["output_ids"]) for it in (*answers, last)]
    expected = [*alone[which][: len(QUESTIONS)], alone[which][0]]
    if found != expected:
        raise SystemExit(f"cycle {number}: wrong tokens: {found}, alone {expected}")


def growth(values: list[float]) -> float:
    """What each cycle adds, over the second half: the slope between medians of its two parts."""
    half = values[len(values) // 2 :]
    quarter = len(half) // 2
    return (statistics.median(half[quarter:]) - statistics.median(half[:quarter])) / quarter


def main() -> int:
    """Run; return 1 if anything is left."""
    parser = argparse.ArgumentParser(description="cycles of open, serve, close")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    given = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d %H:%M')}, {machine()}", flush=True)
    begin()
    alone = [answers_alone(kind, 0) for kind in KINDS]  # before there are threads
    import sglang_distguard as dg

    dg.install()
    tqdm(disable=True).close()  # starts tqdm's own thread, which stays
    begun = time.monotonic()
    for number in range(given.warm_up):
        cycle(number, alone)
    before, seen, wrong = Left.now(), [], []
    print("| cycle | threads | descriptors | files | scopes | tensors | bytes | blocks | RSS |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in tqdm(range(1, given.cycles + 1), unit="cycle", disable=None):
        cycle(number, alone)
        left = Left.now()
        seen.append(left)
        wrong += [f"cycle {number}: {it}" for it in left.more_than(before)]
        if number % 20 == 0 or number == 1:
            print(
                f"| {number} | {len(left.threads)} | {left.descriptors} | {len(left.files)} | "
                f"{left.scopes} | {left.tensors} | {left.tensor_bytes} | {left.blocks} | "
                f"{left.rss:.1f} MiB |",
                flush=True,
            )
    memory = growth([it.rss for it in seen])
    blocks = growth([float(it.blocks) for it in seen])
    print(
        f"\n{given.cycles} cycles in {time.monotonic() - begun:.0f} s; each of the second half adds "
        f"{memory * 1024:+.1f} KiB of resident memory and {blocks:+.1f} blocks of CPython's allocator"
    )
    if memory > GROWTH:
        wrong.append(f"resident memory grows by {memory:.3f} MiB in each cycle")
    for it in wrong[:20]:
        print(f"WRONG: {it}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
