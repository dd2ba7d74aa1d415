"""Compares engines with CUDA graphs, open at once on one GPU, with `sgl.Engine` alone.

``python verify/gpu_engines.py MODELS`` makes small checkpoints in the folder MODELS. Each part has
its own process: each engine alone as SGLang's own, twice; then all with the guard, opened at once
and asked by a thread each, whose memory is released and resumed meanwhile; then one engine that is
opened, asked and closed again and again. Tokens and log probabilities are compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu import MEMBERS, make_models

ROUNDS = 25
CYCLES = 12
STEPS = 16
#: Seconds for one process.
LIMIT = 280.0


def settings(models: Path, name: str, **others: Any) -> Any:
    from sglang_distguard.testing import graphs, server_args

    fields = {**graphs.CUDA_GRAPHS, "mem_fraction_static": 0.1, **others}
    return server_args(models / name, dtype="bfloat16", **fields)


def answers(engine: Any) -> list[Any]:
    """Tokens and log probabilities of each prompt, one request after another."""
    from sglang_distguard.testing.steps import PROMPTS

    how = {"temperature": 0, "max_new_tokens": STEPS, "ignore_eos": True}
    made = []
    for prompt in PROMPTS:
        answer = engine.generate(input_ids=list(prompt), sampling_params=how, return_logprob=True)
        chances = [it[0] for it in answer["meta_info"]["output_token_logprobs"]]
        made.append([answer["output_ids"], chances])
    return made


def alone(models: Path, name: str, output: Path) -> None:
    """Ask one engine of SGLang's own, without the guard."""
    from sglang import Engine

    engine = Engine(server_args=settings(models, name))
    output.write_text(json.dumps(answers(engine)))
    print(f"{name}: {len(answers(engine))} answers")
    engine.shutdown()


def used() -> int:
    """MiB of the card that are in use."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) // 2**20


def together(models: Path, references: Path) -> None:
    """Open all engines; ask them at once, also while the memory of one is released."""
    import sglang_distguard
    from sglang_distguard.testing.updates import weights_of

    sglang_distguard.install()
    expected = {name: json.loads((references / f"{name}.json").read_text()) for name in MEMBERS}

    def opened(name: str) -> Any:
        args = settings(models, name, enable_memory_saver=True, max_total_tokens=None)
        return sglang_distguard.Engine(name=name, server_args=args)

    with ThreadPoolExecutor(len(MEMBERS)) as pool:
        engines = dict(zip(MEMBERS, pool.map(opened, MEMBERS), strict=True))
    pools = {it: engines[it].get_server_info().get("max_total_num_tokens") for it in MEMBERS}
    print(f"opened at once; tokens: {pools}; {used()} MiB of the card in use", flush=True)

    def wrong(names: Iterator[str] | tuple[str, ...], rounds: int) -> int:
        """How often an engine of ``names``, all asked at once, answered otherwise than alone."""
        found: list[int] = []
        members = tuple(names)
        meet = threading.Barrier(len(members))

        def ask(name: str) -> None:
            meet.wait()
            found.extend(answers(engines[name]) != expected[name] for _ in range(rounds))

        threads = [threading.Thread(target=ask, args=(name,)) for name in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(members) * rounds
        return sum(found)

    print(f"asked at once: {wrong(MEMBERS, ROUNDS)} of {len(MEMBERS) * ROUNDS} answered otherwise")
    for name in MEMBERS:
        before = used()
        engines[name].release_memory_occupation()
        released = before - used()
        others = tuple(it for it in MEMBERS if it != name)
        meanwhile = wrong(others, 5)
        engines[name].resume_memory_occupation()
        for answer in (
            engines[name].begin_weight_update(),
            engines[name].update_weights_from_tensor(weights_of(models / name)),
            engines[name].end_weight_update(),
        ):
            assert answer[0], answer
        print(
            f"{name}: {released} MiB released; others meanwhile: {meanwhile} of {5 * len(others)} "
            f"answered otherwise; all afterwards: {wrong(MEMBERS, 5)} of {5 * len(MEMBERS)}",
            flush=True,
        )
    for engine in engines.values():
        engine.close()


def cycles(models: Path, references: Path, *, saves: bool) -> None:
    """Open, ask and close one engine again and again; print what stays in use."""
    import sglang_distguard

    sglang_distguard.install()
    import sglang.srt.entrypoints.engine  # noqa: F401  # its imports take memory, too

    left, wrong = [], 0
    for cycle in range(CYCLES):
        name = MEMBERS[cycle % len(MEMBERS)]
        expected = json.loads((references / f"{name}.json").read_text())
        asked = settings(models, name, enable_memory_saver=saves, max_total_tokens=None)
        with sglang_distguard.Engine(name=name, server_args=asked) as engine:
            wrong += answers(engine) != expected
        del engine
        left.append(used())
    print(
        f"{wrong} of {CYCLES} answered otherwise; MiB in use after each: {left}; "
        f"{threading.active_count()} threads"
    )


def references(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (label, arguments) of every process of SGLang's own engines."""
    for name in MEMBERS:
        yield f"{name} alone", ["--alone", name, "--output", str(folder / f"{name}.json")]
        yield f"{name} again", ["--alone", name, "--output", str(folder / f"{name}.again")]


def parts(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (label, arguments) of every process with the guard, in order."""
    yield "guarded, at once", ["--together", "--output", str(folder)]
    yield "guarded, again and again", ["--cycles", "plain", "--output", str(folder)]
    yield "the same with enable_memory_saver", ["--cycles", "saver", "--output", str(folder)]


def run(models: Path, said: str, arguments: list[str]) -> int:
    """Run one part in a process of its own and print its output."""
    from torch_memory_saver.utils import get_binary_path_from_package

    saver = get_binary_path_from_package("torch_memory_saver_hook_mode_preload")
    environment = {**os.environ, "LD_PRELOAD": str(saver)}
    command = [sys.executable, __file__, str(models), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    print(f"{said}: {done.stdout.strip() or 'nothing printed'}", flush=True)
    if done.returncode:
        print(done.stderr[-3000:])
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cycles", choices=["plain", "saver"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.alone:
            alone(options.models, options.alone, options.output)
        elif options.together:
            together(options.models, options.output)
        else:
            cycles(options.models, options.output, saves=options.cycles == "saver")
        return 0
    make_models(parser, options.models)
    failed = 0
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        alone_at_once = list(references(folder))  # each takes a minute, most of it for imports
        with ThreadPoolExecutor(len(alone_at_once)) as threads:
            ended = [threads.submit(run, options.models, *it) for it in alone_at_once]
        failed += sum(bool(it.result()) for it in ended)
        for said, arguments in parts(folder):
            failed += bool(run(options.models, said, arguments))
        for name in MEMBERS:  # otherwise nothing could be compared
            one, two = (folder / f"{name}.json", folder / f"{name}.again")
            print(f"{name}: the same twice alone: {one.read_text() == two.read_text()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
