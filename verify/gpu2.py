"""Compares runners of one process on two GPUs with each alone on one of them, bit for bit.

``python verify/gpu2.py MODELS`` makes small checkpoints in the folder MODELS. Each model runs alone
with plain SGLang, eager and with decode graphs, each in a process of its own. Then one process with
the guard builds each on both cards, from threads at once, and uses them from threads whose current
device is either card. With fewer than two GPUs it says so and ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODELS = ("gpt2", "opt")
MODES = ("eager", "graphs")
#: (model, card) of the runners of the process.
RUNNERS = (("gpt2", 0), ("opt", 1), ("gpt2", 1), ("opt", 0))
ROUNDS = 20
STEPS = 8
#: Seconds for one process.
LIMIT = 200.0
#: NVLink's multicast is not available on every machine with several GPUs.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def say(*words: Any) -> None:
    print(*words, flush=True)


def settings(models: Path, name: str, mode: str) -> Any:
    from sglang_distguard.testing import create_model, graphs, server_args

    how = graphs.CUDA_GRAPHS if mode == "graphs" else {}
    folder = create_model(name, models)
    return server_args(folder, dtype="bfloat16", **{**how, "mem_fraction_static": 0.1})


def logits_of(runner: Any, **how: Any) -> Any:
    from sglang_distguard.testing import steps

    return steps.generate(runner, steps=STEPS, **how).logits


def alone(models: Path, name: str, mode: str, card: int, output: Path) -> None:
    """Build and run one runner with plain SGLang on one card."""
    import torch
    from sglang_distguard.testing import steps

    torch.cuda.set_device(card)
    runner = steps.build(settings(models, name, mode), gpu_id=card)
    torch.save(logits_of(runner), output / f"{name}-{mode}-{card}.pt")


def at_once(work: Callable[[Any], Any], values: Any) -> list[Any]:
    """Call ``work`` with each value in a thread of its own, at the same moment."""
    values = list(values)
    meet = threading.Barrier(len(values))

    def one(value: Any) -> Any:
        meet.wait()
        return work(value)

    with ThreadPoolExecutor(len(values)) as pool:
        return [it.result() for it in [pool.submit(one, value) for value in values]]


def together(models: Path, references: Path, mode: str) -> bool:
    """Build and use all runners of ``RUNNERS``; print how many generations had other bits."""
    import sglang_distguard as dg
    import torch
    from sglang_distguard.testing import bit_equal

    expected = {
        name: torch.load(references / f"{name}-{mode}-{card}.pt")
        for name, card in zip(MODELS, (0, 1), strict=True)
    }
    begun = time.perf_counter()

    def build(given: tuple[str, int]) -> Any:
        name, card = given
        label = f"{name} on {card}"
        runner = dg.build_runner(settings(models, name, mode), name=label, gpu_id=card)
        assert torch.cuda.current_device() == 0, "the build changed its caller's device"
        return runner

    runners = at_once(build, RUNNERS)
    say(f"{mode}: built at once in {time.perf_counter() - begun:.1f} s")
    right = True
    for (name, card), runner in zip(RUNNERS, runners, strict=True):
        keys = getattr(runner.token_to_kv_pool, "k_buffer", [])
        places = {str(it.device) for it in (*runner.model.parameters(), *keys)}
        right = right and places == {f"cuda:{card}"}
        say(
            f"  {name} on {card}: tensors on {sorted(places)}, {runner.max_total_num_tokens} tokens"
        )
    for said, current in (
        ("its own", lambda card: card),
        ("the other", lambda card: 1 - card),
        ("0", lambda card: 0),
    ):

        def use(given: Any, current: Callable[[int], int] = current) -> tuple[int, bool]:
            (name, card), runner = given
            torch.cuda.set_device(current(card))
            made = [logits_of(runner, activate=dg.activate) for _ in range(ROUNDS)]
            kept = torch.cuda.current_device() == current(card)
            return sum(not bit_equal(it, expected[name]) for it in made), kept

        found = at_once(use, zip(RUNNERS, runners, strict=True))
        wrong, kept = [it for it, _ in found], all(kept for _, kept in found)
        right = right and not any(wrong) and kept
        say(
            f"  from threads whose current device is {said}: {wrong} of {ROUNDS} each with other "
            f"bits than alone; current device kept: {kept}"
        )
    for runner in runners:
        dg.close(runner)
    used = [(total - free) // 2**20 for free, total in map(torch.cuda.mem_get_info, (0, 1))]
    say(f"  closed; MiB in use on the cards: {used}; {'ok' if right else 'WRONG'}")
    return right


def guarded(models: Path, references: Path, modes: Sequence[str]) -> int:
    """Both modes in one process; return how many were wrong or raised."""
    import sglang_distguard

    sglang_distguard.install()
    wrong = 0
    for mode in modes:
        try:
            wrong += not together(models, references, mode)
        except BaseException:
            wrong += 1
            say(f"{mode} FAILED: " + "\n  ".join(traceback.format_exc().strip().splitlines()[-12:]))
    return wrong


def child(models: Path, *arguments: str) -> str:
    """Run this program's part in a process of its own; return why it failed, or nothing."""
    command = [sys.executable, __file__, str(models), *arguments]
    environment = {**ENVIRONMENT, **os.environ}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"not at its end after {LIMIT:.0f} s"
    return "" if not done.returncode else f"exit code {done.returncode}: {done.stderr[-1500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("modes", nargs="*", help="eager, graphs; default: both")
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "CARD"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    modes = options.modes or list(MODES)
    if not set(modes) <= set(MODES):
        parser.error(f"modes are {', '.join(MODES)}")
    import torch

    if torch.cuda.device_count() < 2:
        say(f"skipped: there are {torch.cuda.device_count()} GPUs here, and this needs two")
        return 0
    if options.output:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.alone:
            name, card = options.alone
            alone(options.models, name, modes[0], int(card), options.output)
            return 0
        return guarded(options.models, options.output, modes)
    from sglang_distguard.testing import create_model

    begun = time.perf_counter()
    say(*(torch.cuda.get_device_name(it) for it in (0, 1)), "torch", torch.__version__)
    for name in MODELS:
        create_model(name, options.models)
    with tempfile.TemporaryDirectory() as kept:
        wanted = [
            (name, card, mode) for name, card in zip(MODELS, (0, 1), strict=True) for mode in modes
        ]
        with ThreadPoolExecutor(len(wanted)) as pool:
            ended = [
                pool.submit(
                    child, options.models, mode, "--alone", name, str(card), "--output", kept
                )
                for name, card, mode in wanted
            ]
        for (name, card, mode), it in zip(wanted, ended, strict=True):
            say(f"{name} alone on {card}, {mode}: {it.result() or 'ok'}")
        say(f"references after {time.perf_counter() - begun:.0f} s")
        command = [sys.executable, __file__, str(options.models), *modes, "--output", kept]
        try:  # its output is seen as it comes
            environment = {**ENVIRONMENT, **os.environ}
            code = subprocess.run(command, env=environment, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = 1
            say(f"not at its end after {LIMIT:.0f} s")
    say(f"all after {time.perf_counter() - begun:.0f} s; {'ok' if not code else 'WRONG'}")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
