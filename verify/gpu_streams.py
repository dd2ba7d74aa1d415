"""Decode rate of one, two and four runners at once on one GPU, with and without a stream each.

``python verify/gpu_streams.py MODELS [SECTION ...]`` makes four OPT checkpoints (0.8 billion
parameters) in the folder MODELS, and lets each generate alone with plain SGLang, in a process of
its own. Then one process with the guard builds all four and generates with 1, 2 and 4 of them from
a thread each: batches of eight requests, whose tokens the host reads after each step, as a server
does. Each line has tokens a second, the ratio to one runner alone in the same process ("of one"),
milliseconds of a step and of processor time in it, and how many generations had other bits than
alone. Where processor time times runners is about a step, the interpreter is the limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gpu_breadth_common import has_card
from gpu_loads import make, opt, run

COUNT = 4
BATCH = 8
ROUNDS = 3
KINDS = ("graphs", "eager")
#: The last, the rate of four processes of plain SGLang, is measured only where it is asked for.
SECTIONS = (*KINDS, "processes")


def arguments(folder: Path, kind: str) -> Any:
    from sglang_distguard.testing import server_args

    graphs = {
        "disable_cuda_graph": False,
        "cuda_graph_bs_decode": [BATCH],
        "cuda_graph_max_bs_decode": BATCH,
        "disable_prefill_cuda_graph": True,
    }
    return server_args(
        folder,
        dtype="bfloat16",
        mem_fraction_static=0.9,
        max_total_tokens=8192,
        **(graphs if kind == "graphs" and has_card() else {}),
    )


def finish() -> None:
    import torch

    if has_card():
        torch.cuda.current_stream().synchronize()


def generate(
    runner: Any, steps: int, activate: Callable[[Any], Any], meet: Callable[[], Any] = int
) -> tuple[dict[str, float], Any]:
    """Prefill, then decode, reading the tokens after each step. Return times, and what was made."""
    import torch
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang_distguard.testing import steps as sglang_steps

    prompts = [[(7 * i + 3 + j) % 997 for i in range(32)] for j in range(BATCH)]
    request = {"sampling_params": SamplingParams(temperature=0, max_new_tokens=steps + 8)}
    with activate(runner), torch.no_grad():
        batch, token, logits = sglang_steps._extend(prompts, runner, request)
        tokens = [token.tolist()]
        finish()
        meet()
        begin, processor = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            token, logits = sglang_steps._decode(token, batch, runner)
            tokens.append(token.tolist())
        finish()
        times = {
            "begin": begin,
            "end": time.perf_counter(),
            "processor": time.thread_time() - processor,
        }
        return times, (tokens, logits.cpu())


def equal(one: Any, other: Any) -> bool:
    import torch

    return one[0] == other[0] and torch.equal(one[1], other[1])


def alone(folder: Path, kind: str, steps: int, output: Path, meet: int) -> None:
    """Generate with plain SGLang; with ``meet`` processes that do so at the same time."""
    import torch
    from sglang_distguard.testing import steps as sglang_steps

    runner = sglang_steps.build(arguments(folder, kind))
    generate(runner, steps, nullcontext)

    def wait_for_others() -> None:
        output.with_suffix(".ready").touch()
        while len(list(output.parent.glob(f"{kind}*{meet}.ready"))) < meet:
            time.sleep(0.002)  # there is nothing else to wait for

    times, made = generate(runner, steps, nullcontext, wait_for_others if meet else int)
    shift = time.time() - time.perf_counter()
    if meet:  # on a clock that all processes have
        clock = {it: times[it] + shift for it in ("begin", "end")}
        output.write_text(json.dumps({**times, **clock}))
    else:
        torch.save(made, output)


def report(
    said: str, times: Sequence[dict[str, float]], steps: int, one: float, wrong: str
) -> float:
    """Print the line of one measurement; return its tokens per second."""
    seconds = max(it["end"] for it in times) - min(it["begin"] for it in times)
    rate = len(times) * BATCH * steps / seconds
    step = sum(it["end"] - it["begin"] for it in times) / len(times) / steps
    processor = sum(it["processor"] for it in times) / len(times) / steps
    ratio = f"{rate / one:.2f}" if one else "1.00"
    print(
        f"{said}: {rate:.0f} tokens/s, {ratio} of one; a step {1e3 * step:.2f} ms, "
        f"processor {1e3 * processor:.2f} ms; {wrong}",
        flush=True,
    )
    return rate


def together(folders: Sequence[Path], kind: str, steps: int, references: Path) -> None:
    """Build four runners with each setting of ``streams``; measure 1, 2 and 4 of them."""
    import sglang_distguard
    import torch

    sglang_distguard.install()
    expected = [torch.load(references / f"{it.name}.{kind}.pt") for it in folders]
    one = 0.0
    for streams in ("share", "own"):
        with sglang_distguard.runner_scope(streams=streams):
            runners = [sglang_distguard.build_runner(arguments(it, kind)) for it in folders]
        for runner in runners:
            generate(runner, steps, sglang_distguard.activate)
        for count in (1, 2, 4, 2, 4):
            said = f"{kind}, streams={streams}, {count} at once"
            try:
                best, wrong = at_once(runners[:count], expected, steps, sglang_distguard.activate)
                rate = report(
                    said, best, steps, one, f"{wrong} of {count * ROUNDS} with other bits"
                )
                if streams == "share" and count == 1:
                    one = rate
            except BaseException:
                print(f"{said} failed:\n{traceback.format_exc()[-1200:]}", flush=True)
        print("   streams:", [stream_of(it) for it in runners], flush=True)
        while runners:
            sglang_distguard.close(runners.pop())
        gc.collect()
        if has_card():
            torch.cuda.empty_cache()


def stream_of(runner: Any) -> Any:
    from sglang_distguard.runner.handle import handle_of

    own = handle_of(runner).stream
    return own and own.stream.cuda_stream


def at_once(
    runners: Sequence[Any], expected: Sequence[Any], steps: int, activate: Callable[[Any], Any]
) -> tuple[list[dict[str, float]], int]:
    """Generate several times with each runner in a thread; the times of the fastest round."""
    best: list[dict[str, float]] = []
    wrong = 0
    for _ in range(ROUNDS):
        meet = threading.Barrier(len(runners), timeout=60)
        with ThreadPoolExecutor(len(runners)) as pool:
            futures = [pool.submit(generate, it, steps, activate, meet.wait) for it in runners]
            made = [it.result() for it in futures]
        wrong += sum(not equal(it[1], one) for it, one in zip(made, expected, strict=False))
        times = [it[0] for it in made]
        if not best or span(times) < span(best):
            best = times
    return best, wrong


def span(times: Sequence[dict[str, float]]) -> float:
    return max(it["end"] for it in times) - min(it["begin"] for it in times)


def processes(base: Sequence[str], folders: Sequence[Path], steps: int, folder: Path) -> None:
    """The rate of as many processes of plain SGLang, which share nothing."""
    one = 0.0
    for count in (1, 4):
        outputs = [folder / f"graphs-{it}-of-{count}.json" for it in range(count)]
        for output in folder.glob(f"*-of-{count}.*"):
            output.unlink()
        how = ["--kind", "graphs", "--meet", str(count)]
        commands = [
            [*base, "--alone", str(it), "--output", str(output), *how]
            for it, output in zip(folders, outputs, strict=False)
        ]
        with ThreadPoolExecutor(count) as pool:
            if not all(pool.map(run, commands)):
                continue
        times: list[dict[str, float]] = [json.loads(it.read_text()) for it in outputs]
        rate = report(
            f"graphs, {count} processes of plain SGLang", times, steps, one, "not compared"
        )
        one = one or rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--steps", type=int, default=150, help="of each generation")
    parser.add_argument("--tiny", action="store_true", help="try the program itself")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--meet", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--together", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sections = options.sections or list(KINDS)
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    models, steps = options.models, options.steps
    size = "tiny" if options.tiny else "0.8b"
    folders = [models / f"opt-{size}-{seed}" for seed in range(COUNT)]
    references = models / "streams"
    if options.make is not None:
        config = opt(128, 2, 1000) if options.tiny else opt(2048, 14, 50272)
        make(folders[options.make], config, options.make)
        return 0
    if options.alone or options.together:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.alone:
            alone(options.alone, options.kind, steps, options.output, options.meet)
        else:
            together(folders, options.together, steps, references)
        return 0
    import torch

    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(0), "torch", torch.__version__, flush=True)
    elif not options.tiny:
        parser.exit(
            message="skipped: there is no GPU here; with --tiny the program itself can be tried\n"
        )
    references.mkdir(parents=True, exist_ok=True)
    base = [sys.executable, __file__, str(models), "--steps", str(steps)]
    base += ["--tiny"] if options.tiny else []
    makers = [subprocess.Popen([*base, "--make", str(seed)]) for seed in range(COUNT)]
    print(f"made {COUNT} checkpoints: {[it.wait() for it in makers]}", flush=True)
    kinds = [it for it in KINDS if it in sections]
    commands = [
        [*base, "--alone", str(it), "--kind", kind, "--output", str(output)]
        for kind in kinds
        for it in folders
        if not (output := references / f"{it.name}.{kind}.pt").exists()
    ]
    with ThreadPoolExecutor(2 * COUNT) as pool:
        well = all(pool.map(run, commands))
    for kind in kinds:
        well = run([*base, "--together", kind]) and well
    if "processes" in sections:
        processes(base, folders, steps, references)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
