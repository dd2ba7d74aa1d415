"""Measures what the guard costs a decode step: the same runner with and without hooks, in turn.

    .venv/bin/python benchmarks/forward_overhead.py
        [--rounds N] [--calls N] [--model NAME | --checkpoint FOLDER] [--main-thread]

By default it runs in a thread, as servers do. The context of the thread that imported
torch._inductor holds a variable for each patch of its configuration (torch 2.14.1: 40), and CPython
copies all of them at each step.

It prints ratios guarded / plain, of the fastest tenth of all calls and round by round (median and
quartiles). They are of `forward` and `sample` on one batch, and of whole decode steps, which make
the batch, too. There are three cases: the only runner of the process; the same runner while a
second runner lives; and that second runner, which has its own scope, against the first without the
guard (two runners of one architecture). On a GPU decode steps replay CUDA graphs. Then it counts
Python frames, bytecode instructions and native calls, and measures the time of reading a scoped
global.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import sglang_distguard as dg
import torch
from sglang_distguard import _core
from sglang_distguard.process import installation
from sglang_distguard.testing import create_model, graphs, prepare_environment, server_args, steps
from tqdm import tqdm

Work = Callable[[], object]
READ_ROUNDS = 5


class Decoding:
    """A runner in the middle of a generation."""

    def __init__(self, model: Path, name: str) -> None:
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {"mem_fraction_static": 0.1} if on_gpu else {}
        settings |= graphs.CUDA_GRAPHS if on_gpu else {}
        dtype = "bfloat16" if on_gpu else "float32"
        self.runner = dg.build_runner(server_args(model, dtype=dtype, **settings), name=name)

    def start(self) -> None:
        """Prefill; the batch of the first decode step stays for `forward_and_sample`."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        self._batch, token, _ = steps._extend(steps.PROMPTS, self.runner, {})
        self._batch.input_ids = token.to(torch.int64)
        self._batch.prepare_for_decode()
        self._forward_batch = ForwardBatch.init_new(
            self._batch, self.runner, return_hidden_states_before_norm=False
        )

    def forward_and_sample(self) -> None:
        """The same decode step again."""
        output: Any = self.runner.forward(self._forward_batch).logits_output
        self.runner.sample(output, self._forward_batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def generate(self) -> None:
        """A prefill and 31 decode steps."""
        steps.generate(self.runner, steps=31)


@contextmanager
def plain() -> Iterator[None]:
    """Undo the hooks in the with block; values of the default scope are SGLang's own again.

    `uninstall()` refuses while a runner has its own scope; here that runner does not run.
    """
    hooks = installation._installation
    assert hooks is not None
    installation._undo(hooks)
    try:
        yield
    finally:
        hooks.watcher.start()
        installation._apply(list(hooks.plans.values()))
        _core.call_after_builds(installation._read_directly)
        _core.note_build()


def times_of(work: Work, calls: int) -> list[float]:
    """Seconds of each of ``calls`` calls."""
    taken = []
    for _ in range(calls):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return taken


def undisturbed(taken: Sequence[float]) -> float:
    """The bound of the fastest tenth, which other work of the machine does not affect."""
    return statistics.quantiles(taken, n=10)[0]


def report(what: str, guarded: Decoding, bare: Decoding, rounds: int, calls: int) -> None:
    """Compare and print."""
    #: Kind of work -> (calls in a block, forwards of each).
    kinds = {"forward + sample": (calls, 1), "whole steps": (max(2, calls // 10), 32)}
    blocks: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in kinds}

    def measure(it: Decoding) -> list[list[float]]:
        with torch.no_grad():
            it.start()
            works = (it.forward_and_sample, it.generate)
            return [times_of(work, kinds[name][0]) for name, work in zip(kinds, works, strict=True)]

    gc.collect()
    gc.disable()
    for number in tqdm(range(rounds + 1), desc=what, disable=None):
        with_guard = measure(guarded)
        with plain():
            without = measure(bare)
        if number > 0:  # the first warms up
            for name, g, p in zip(kinds, with_guard, without, strict=True):
                blocks[name].append((g, p))
    gc.enable()
    for name, pairs in blocks.items():
        forwards = kinds[name][1]
        fastest = [undisturbed([it for pair in pairs for it in pair[side]]) for side in (0, 1)]
        ratios = [undisturbed(g) / undisturbed(p) for g, p in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{what:30} {name:17} {fastest[1] / forwards * 1e3:8.3f} ms "
            f"{fastest[0] / forwards * 1e3:8.3f} ms   {fastest[0] / fastest[1]:.4f}   "
            f"{middle:.4f} ({low:.4f}-{high:.4f})",
            flush=True,
        )


def counted(it: Decoding) -> dict[str, float]:
    """Python frames, native calls and bytecode instructions of a forward and a sample."""
    seen: Counter[str] = Counter()

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        seen["frames" if event == "call" else event] += 1

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        seen["instructions"] += event == "opcode"
        return trace

    with torch.no_grad():
        it.start()
        it.forward_and_sample()
        for switch, hook in ((sys.setprofile, profile), (sys.settrace, trace)):
            switch(hook)
            try:
                it.forward_and_sample()
            finally:
                switch(None)
    return {
        "Python frames": seen["frames"],
        "native calls": seen["c_call"],
        "bytecode instructions": seen["instructions"],
    }


def reads(runner: Any) -> dict[str, tuple[float, float]]:
    """Nanoseconds of one call of a getter of a scoped global, without the guard and with it."""
    from sglang.srt.model_executor.forward_context import has_forward_context
    from sglang.srt.runtime_context import get_context, get_exec, get_parallel

    getters = (get_context, get_parallel, get_exec, has_forward_context)

    def times() -> dict[str, float]:
        return {it.__name__: min(timeit.repeat(it, number=50_000, repeat=5)) for it in getters}

    pairs = []
    for _ in range(READ_ROUNDS):  # in turn, because a processor changes its frequency
        with plain():
            without = times()
        with dg.activate(runner):
            pairs.append((without, times()))

    def fastest(name: str, side: int) -> float:
        return min(pair[side][name] for pair in pairs) / 50_000 * 1e9

    return {name: (fastest(name, 0), fastest(name, 1)) for name in pairs[0][0]}


def table_of_counts(columns: dict[str, dict[str, float]]) -> None:
    """Print one line per count and one column per case, each with its ratio to the first case."""
    print(f"\n{'forward + sample':24}" + "".join(f"{name:>24}" for name in columns))
    bare = next(iter(columns.values()))
    for what, base in bare.items():
        if base == 0:  # CPython 3.12 does not trace bytecodes of frames that already run
            print(f"{what:24}   not counted")
            continue
        cells = [f"{it[what]:.0f} ({it[what] / base:.3f})" for it in columns.values()]
        print(f"{what:24}" + "".join(f"{cell:>24}" for cell in cells))


def table_of_reads(columns: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Print one line per getter; each case beside its own time without the guard."""
    print(f"\n{'ns of a read':24}" + "".join(f"{name:>28}" for name in columns))
    for what in next(iter(columns.values())):
        pairs = [it[what] for it in columns.values()]
        cells = [f"{bare:.0f} -> {held:.0f} ({held / bare:.3f})" for bare, held in pairs]
        print(f"{what:24}" + "".join(f"{cell:>28}" for cell in cells))


def main(rounds: int, calls: int, name: str, checkpoint: Path | None) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    models = [checkpoint or create_model(name, Path(".cache/models"), seed=seed) for seed in (0, 1)]
    name = checkpoint.name if checkpoint is not None else name
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    dg.install()
    first = Decoding(models[0], "first")
    print(f"{name}, two requests, {where}; {rounds} rounds of {calls} calls; the fastest tenth")
    print(f"{'':48} {'plain':>11} {'guarded':>11}   ratio    by round")
    counts: dict[str, dict[str, float]] = {}
    times: dict[str, dict[str, tuple[float, float]]] = {}
    with plain():
        counts["plain"] = counted(first)
    counts["only runner"], times["only runner"] = counted(first), reads(first.runner)
    report("only runner", first, first, rounds, calls)
    second = Decoding(models[1], "second")
    counts["beside a second"] = counted(first)
    times["beside a second"] = reads(first.runner)
    report("beside a second runner", first, first, rounds, calls)
    counts["in its own scope"] = counted(second)
    times["in its own scope"] = reads(second.runner)
    report("the second, in its own scope", second, first, rounds, calls)
    table_of_counts(counts)
    table_of_reads(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="pairs of blocks with and without the guard"
    )
    parser.add_argument("--calls", type=int, default=100, help="decode steps in a block")
    parser.add_argument("--model", default="llama", help="architecture of sglang_distguard.testing")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a checkpoint, for both runners; not --model"
    )
    parser.add_argument("--main-thread", action="store_true", help="run in the main thread")
    given = parser.parse_args()
    prepare_environment()
    import sglang.srt.model_executor.model_runner  # noqa: F401 - in the main thread, as servers do

    arguments = (given.rounds, given.calls, given.model, given.checkpoint)
    if given.main_thread:
        main(*arguments)
    else:
        server = threading.Thread(target=main, args=arguments, name="server")
        server.start()
        server.join()
