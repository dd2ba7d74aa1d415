"""Measures N engines in one process against N of SGLang's own engines, each in its own processes.

    .venv/bin/python benchmarks/engines.py [--engines 2 4 8] [--widths 64 768] [--rounds 3]

Prints Markdown. Every ratio compares two measurements of one run: both sets of engines are open,
and take turns. SGLang's are started as users do: one program for each, which starts a scheduler
and a detokenizer by multiprocessing's "spawn". All sleep while idle (`sleep_on_idle`). CPU seconds
and memory (USS) are those of all processes of a side. The last table is of the engines here only:
requests of one engine, one after the other, while another one is opened and closed all the time,
in turn with nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sglang_distguard
from sglang_distguard.testing import create_model, prepare_environment, server_args

if __name__ == "__mp_main__":  # a process of SGLang's own engine
    prepare_environment()

CACHE = Path(__file__).resolve().parent.parent / ".cache"
#: A batch: prompts of 16 tokens, each answered by 32.
PROMPTS = [[(17 * number + 3 * place) % 990 + 1 for place in range(16)] for number in range(4)]
TOKENS = 32
SHORT = 8
#: Seconds that starting one side may take.
START = 900.0


def model(width: int) -> Path:
    """GPT-2 of this width with random weights: 2 layers if it is tiny, else 4."""

    def build() -> tuple[Any, Any]:
        from transformers import GPT2Config, GPT2LMHeadModel

        layers = 2 if width < 256 else 4
        heads = max(1, width // 64)
        return GPT2LMHeadModel, GPT2Config(
            n_layer=layers, n_head=heads, n_embd=width, vocab_size=1000, n_positions=256
        )

    name = f"gpt2-{width}-wide"
    return create_model(name, CACHE / "models", builders={name: build})


def params(tokens: int) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}


# The program of one side: it is told what to do by lines of JSON, and answers each with one.


class Program:
    """Engines in a process of their own."""

    def __init__(self, is_guest: bool, count: int, folder: str) -> None:
        if is_guest:  # first, as users do: imports of SGLang are quicker then
            sglang_distguard.install()
        prepare_environment()
        self.args = lambda: server_args(
            folder, sleep_on_idle=True, mem_fraction_static=0.95, max_total_tokens=2048
        )
        if is_guest:
            self.open: Any = lambda: sglang_distguard.Engine(
                server_args=self.args(), start_timeout=START
            )
        else:
            from sglang.srt.entrypoints.engine import Engine

            self.open = lambda: Engine(server_args=self.args())
        self.engines = [self.open() for _ in range(count)]

    def serve(self, batches: int) -> dict[str, Any]:
        """Each engine answers this many batches, one after the other, all engines at once."""

        def one(engine: Any) -> int:
            answered = 0
            for _ in range(batches):
                found = engine.generate(
                    input_ids=[list(it) for it in PROMPTS], sampling_params=params(TOKENS)
                )
                answered += sum(len(it["output_ids"]) for it in found)
            return answered

        if len(self.engines) == 1:  # of SGLang's, which is for the main thread
            return {"tokens": one(self.engines[0])}
        with ThreadPoolExecutor(len(self.engines)) as threads:
            return {"tokens": sum(threads.map(one, self.engines))}

    def latency(self, seconds: float, *, disturbed: bool) -> dict[str, Any]:
        """Ask the first engine for a while; milliseconds of each answer, and how many were opened."""
        is_over, cycles = threading.Event(), 0

        def open_and_close() -> None:
            nonlocal cycles
            while not is_over.is_set():
                self.open().close()
                cycles += 1

        other = threading.Thread(target=open_and_close)
        if disturbed:
            other.start()
        found, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until:
            begun = time.perf_counter()
            self.engines[0].generate(input_ids=list(PROMPTS[0]), sampling_params=params(SHORT))
            found.append((time.perf_counter() - begun) * 1000)
        is_over.set()
        if disturbed:
            other.join()
        return {"ms": found, "cycles": cycles}

    def quit(self) -> dict[str, Any]:
        for engine in self.engines:
            engine.shutdown()
        return {}


def child(is_guest: bool, count: int, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SGLang prints
    program = Program(is_guest, count, folder)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        what = told.pop("do")
        print(json.dumps(getattr(program, what)(**told)), file=answers, flush=True)
        if what == "quit":
            return


# The measuring process


class Side:
    """All processes of one side."""

    def __init__(self, is_guest: bool, count: int, folder: Path, log: Path) -> None:
        begun = time.perf_counter()
        numbers = [str(count)] if is_guest else ["1"] * count
        with log.open("a") as errors:
            self.programs = [
                subprocess.Popen(
                    [sys.executable, __file__, "--child", str(int(is_guest)), it, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                for it in numbers
            ]
        self._answers()
        self.seconds = time.perf_counter() - begun
        self.start_cpu = self.cpu()
        self.count = count

    def _answers(self) -> list[dict[str, Any]]:
        # Programs that are late are killed, which ends the reading below.
        late = threading.Timer(START, lambda: [it.kill() for it in self.programs])
        late.daemon = True
        late.start()
        lines = [it.stdout.readline() for it in self.programs if it.stdout is not None]
        late.cancel()
        if not all(lines):
            raise SystemExit(
                f"a program has ended, or not answered in {START:g} s; see target/engines.log"
            )
        return [json.loads(line) for line in lines]

    def ask(self, what: str, **arguments: Any) -> list[dict[str, Any]]:
        for program in self.programs:
            assert program.stdin is not None
            program.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            program.stdin.flush()
        return self._answers()

    def processes(self) -> list[Any]:
        import psutil

        roots = [psutil.Process(it.pid) for it in self.programs]
        return [*roots, *(child for root in roots for child in root.children(recursive=True))]

    def cpu(self) -> float:
        times = [it.cpu_times() for it in self.processes()]
        return sum(it.user + it.system for it in times)

    def memory(self) -> float:
        return sum(it.memory_full_info().uss for it in self.processes()) / 2**20

    def serve(self, batches: int) -> tuple[float, float]:
        """Tokens per second and CPU milliseconds per token."""
        before, begun = self.cpu(), time.perf_counter()
        tokens = sum(it["tokens"] for it in self.ask("serve", batches=batches))
        seconds = time.perf_counter() - begun
        return tokens / seconds, (self.cpu() - before) / tokens * 1000

    def idle(self, seconds: float) -> float:
        """Cores for each engine."""
        before = self.cpu()
        time.sleep(seconds)
        return (self.cpu() - before) / seconds / self.count

    def end(self) -> None:
        self.ask("quit")
        for program in self.programs:
            program.wait(120)


def row(what: str, here: float, plain: float, aim: str) -> str:
    return f"| {what} | {here:.4g} | {plain:.4g} | {here / plain:.2f} | {aim} |"


def compare(count: int, width: int, given: argparse.Namespace) -> None:
    folder, log = model(width), given.log
    here = Side(True, count, folder, log)
    plain = Side(False, count, folder, log)
    for side in (here, plain):
        side.serve(1)
    turns = [(here.serve(given.batches), plain.serve(given.batches)) for _ in range(given.rounds)]

    def median(side: int, what: int) -> float:
        return statistics.median(it[side][what] for it in turns)

    print(f"\n### {count} engines, {width} wide\n")
    print("| | one process | `sgl.Engine` | ratio | aim |\n|---|---|---|---|---|")
    print(row("interpreter's start to all ready, s", here.seconds, plain.seconds, "0.25"))
    print(row("CPU seconds of that", here.start_cpu, plain.start_cpu, ""))
    print(row("memory (USS), MiB", here.memory(), plain.memory(), "0.3"))
    print(row("CPU ms per token", median(0, 1), median(1, 1), "1.0"))
    print(row("tokens per second", median(0, 0), median(1, 0), ""))
    idle = here.idle(given.idle), plain.idle(given.idle)
    print(f"| idle, cores per engine | {idle[0]:.4f} | {idle[1]:.4f} | | 0.02 |", flush=True)
    plain.end()
    if count == min(given.engines):
        quiet: list[float] = []
        loud: list[float] = []
        cycles = 0
        for _ in range(given.rounds):
            quiet += here.ask("latency", seconds=given.seconds, disturbed=False)[0]["ms"]
            found = here.ask("latency", seconds=given.seconds, disturbed=True)[0]
            loud += found["ms"]
            cycles += found["cycles"]
        print(
            f"\nOne engine, answers of {SHORT} tokens, {len(quiet)} and {len(loud)} of them; "
            f"another engine was opened and closed {cycles} times:\n"
        )
        print(
            "| | while another opens and closes | undisturbed | ratio | aim |\n|---|---|---|---|---|"
        )
        print(row("p50, ms", percentile(loud, 50), percentile(quiet, 50), ""))
        print(row("p99, ms", percentile(loud, 99), percentile(quiet, 99), "2.0"), flush=True)
    here.end()


def percentile(values: Sequence[float], which: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[which - 1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="engines of one process against sgl.Engine")
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 768])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn of latency")
    given = parser.parse_args()
    given.log = Path(__file__).resolve().parent.parent / "target" / "engines.log"
    given.log.parent.mkdir(exist_ok=True)
    given.log.write_text("")
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, {cores} cores, load {load:.1f} at the begin: "
        f"`benchmarks/engines.py {' '.join(sys.argv[1:])}`",
        flush=True,
    )
    for width in given.widths:
        # The wide models for the smallest number only: which side is faster is the question there.
        for count in given.engines if width == min(given.widths) else given.engines[:1]:
            compare(count, width, given)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(bool(int(sys.argv[2])), int(sys.argv[3]), sys.argv[4])
    else:
        main()
