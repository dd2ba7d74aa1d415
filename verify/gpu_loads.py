"""Loads of real-size checkpoints onto one GPU: how long they take, and whether each bit is right.

``python verify/gpu_loads.py MODELS [SECTION ...]`` makes four OPT checkpoints with different random
weights in the folder MODELS (--gigabytes each), and loads each once with plain SGLang, in a process
of its own, for the checksums of all parameters. Then one process with the guard loads them in
different ways. Each line has the seconds, and how many runners have plain SGLang's parameters;
"x" is how much faster than the same builds in a row as SGLang loads (pinned_loads=False).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

COUNT = 4
SHARDS = 4
WIDTH = 4096
#: Seconds for one process.
LIMIT = 170.0
MIB = 2**20


def configuration(gigabytes: float) -> Any:
    """As many layers as fit; narrow ones where the program itself is tried."""
    width, vocabulary = (WIDTH, 50272) if gigabytes >= 1 else (128, 1000)
    layer = 12 * width * width * 2
    return opt(width, max(1, int((gigabytes * 1e9 - vocabulary * width * 2) / layer)), vocabulary)


def opt(width: int, layers: int, vocabulary: int) -> Any:
    """A configuration of OPT, whose norms need no compiler."""
    from transformers import OPTConfig

    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if width < 2048 else width // 128,
        hidden_size=width,
        ffn_dim=4 * width,
        word_embed_proj_dim=width,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["OPTForCausalLM"],
    )


def make(target: Path, config: Any, seed: int) -> None:
    """Write a checkpoint with random weights, unless it is there."""
    import torch
    from safetensors.torch import save_file
    from transformers import OPTForCausalLM

    if (target / "config.json").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: it.shape for name, it in OPTForCausalLM(config).state_dict().items()}
    shapes.pop("lm_head.weight", None)  # it is the embedding
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    per_file = sum(it.numel() for it in shapes.values()) / SHARDS
    files: dict[str, str] = {}
    shard: dict[str, Any] = {}
    index, size = 1, 0
    for place, (name, shape) in enumerate(shapes.items(), 1):
        random = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        shard[name] = (random * 0.02).cpu()
        size += shard[name].numel()
        if (size >= per_file and index < SHARDS) or place == len(shapes):
            file = f"model-{index:05d}-of-{SHARDS:05d}.safetensors"
            save_file(shard, target / file, metadata={"format": "pt"})
            files.update(dict.fromkeys(shard, file))
            shard, size, index = {}, 0, index + 1
    listing = {"metadata": {}, "weight_map": files}
    (target / "model.safetensors.index.json").write_text(json.dumps(listing))
    config.save_pretrained(target)  # last: it says that the checkpoint is whole


def folder_of(models: Path, seed: int, gigabytes: float) -> Path:
    return models / f"opt-{gigabytes:g}gb-{seed}"


def arguments(folder: Path) -> Any:
    from sglang_distguard.testing import server_args

    # Each of several at once sizes its pool by what is free, and then takes no more than this.
    return server_args(folder, dtype="bfloat16", mem_fraction_static=0.9, max_total_tokens=4096)


def checksums(runner: Any) -> list[Any]:
    """Two sums over the bits of each parameter: of the values, and of values times positions."""
    import torch

    found: list[Any] = []
    for name, parameter in runner.model.named_parameters():
        bits = parameter.detach().contiguous().view(-1).view(torch.int16)
        plain = weighted = 0
        for part in bits.split(1 << 26):
            values = part.to(torch.int64)
            plain += int(values.sum())
            positions = torch.arange(values.numel(), device=values.device) % 65521
            weighted += int((values * positions).sum())
        found.append([name, plain, weighted])
    return found


def alone(folder: Path, output: Path) -> None:
    """Load with plain SGLang; write checksums; print the seconds of the load."""
    import torch
    from sglang_distguard.testing import steps

    if torch.cuda.is_available():
        torch.ones(1, device="cuda")
    marks = {}

    def after(step: str) -> None:
        marks[step] = time.perf_counter()

    runner = steps.build(arguments(folder), after=after)
    output.write_text(json.dumps(checksums(runner)))
    print(f"plain SGLang alone: the constructor took {marks['load'] - marks['init']:.2f} s")


@contextmanager
def full_collections() -> Iterator[None]:
    """Collect garbage as SGLang does: once, all of it, before the pools are sized."""
    from sglang_distguard.runner import budget, garbage

    class AsSGLang:
        def one(self) -> Any:
            return nullcontext()

    with (
        mock.patch.object(garbage, "collect_before_pools", gc.collect),
        mock.patch.object(budget, "collect_before_load"),
        mock.patch.object(garbage, "LOADS", AsSGLang()),
    ):
        yield


class Loads:
    """Builds runners in one process with the guard, and frees them again."""

    def __init__(self, folders: Sequence[Path], references: Path) -> None:
        import sglang_distguard

        sglang_distguard.install()
        self.guard = sglang_distguard
        self.folders = list(folders)
        self.expected = [json.loads((references / f"{it.name}.json").read_text()) for it in folders]
        self.slow: dict[str, float] = {}

    def build(self, which: int, pinned: bool) -> Any:
        import torch

        with self.guard.runner_scope(pinned_loads=pinned):
            made = self.guard.build_runner(arguments(self.folders[which]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return made

    def in_a_row(self, which: Sequence[int], pinned: bool) -> tuple[float, list[Any]]:
        begin = time.perf_counter()
        made = [self.build(it, pinned) for it in which]
        return time.perf_counter() - begin, made

    def at_once(self, which: Sequence[int], pinned: bool) -> tuple[float, list[Any]]:
        made: list[Any] = [None] * len(which)
        errors: list[str] = []
        meet = threading.Barrier(len(which) + 1)

        def work(place: int) -> None:
            meet.wait()
            try:
                made[place] = self.build(which[place], pinned)
            except BaseException as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])

        threads = [
            threading.Thread(target=work, args=(it,), daemon=True) for it in range(len(which))
        ]
        for thread in threads:
            thread.start()
        meet.wait()
        begin = time.perf_counter()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
        if errors:
            print("   errors:", *errors, sep="\n   ", flush=True)
        return seconds, made

    def free(self, made: list[Any]) -> None:
        import torch

        for runner in made:
            if runner is not None:
                self.guard.close(runner)
        made.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tell(
        self,
        said: str,
        which: Sequence[int],
        pinned: bool,
        way: Callable[[Sequence[int], bool], tuple[float, list[Any]]],
        *,
        like: str,
    ) -> None:
        """Build in one way and print a line; ``like``: what it is compared with."""
        with nullcontext() if pinned else full_collections():
            seconds, made = way(which, pinned)
        right = sum(
            runner is not None and checksums(runner) == self.expected[it]
            for it, runner in zip(which, made, strict=True)
        )
        tokens = [getattr(it, "max_total_num_tokens", None) for it in made]
        self.free(made)
        if not pinned and way == self.in_a_row:
            self.slow[like] = min(seconds, self.slow.get(like, math.inf))
        ratio = self.slow[like] / seconds if like in self.slow else math.nan
        told = self.guard.snapshot()
        kept = f"; STILL REGISTERED {told['pinned_files']}" if told["pinned_files"] else ""
        refused = f"; NOT REGISTERED: {told['not_pinned']}" if told["not_pinned"] else ""
        print(
            f"{said}: {seconds:.2f} s, x {ratio:.2f}; right {right} of {len(which)}; "
            f"tokens {tokens}{kept}{refused}",
            flush=True,
        )

    def different(self) -> None:
        each = range(len(self.folders))
        for _ in range(2):
            self.tell("four different in a row as SGLang", each, False, self.in_a_row, like="four")
            self.tell("four different at once, registered", each, True, self.at_once, like="four")
        self.tell("four different at once as SGLang", each, False, self.at_once, like="four")
        self.tell("four different in a row, registered", each, True, self.in_a_row, like="four")

    def same(self) -> None:
        each = [0] * len(self.folders)
        for _ in range(2):
            self.tell(
                "the same four times in a row as SGLang", each, False, self.in_a_row, like="same"
            )
            self.tell(
                "the same four times at once, registered", each, True, self.at_once, like="same"
            )

    def one(self) -> None:
        for _ in range(3):
            self.tell("one alone as SGLang", [0], False, self.in_a_row, like="one")
            self.tell("one alone, registered", [0], True, self.in_a_row, like="one")


SECTIONS = ("different", "same", "one")


def together(folders: Sequence[Path], references: Path, sections: Sequence[str]) -> None:
    loads = Loads(folders, references)
    loads.free([loads.build(0, True)])  # modules, kernels, page cache
    for section in sections:
        try:
            getattr(loads, section)()
        except BaseException:
            print(f"section {section} failed:\n{traceback.format_exc()[-1500:]}", flush=True)


def run(command: Sequence[str]) -> bool:
    """Run a part in a process of its own and pass on what it prints; return whether it ended well."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        print(f"not ended after {LIMIT:.0f} s: {command[2:]}", flush=True)
        return False
    if done.returncode:
        print(f"exit code {done.returncode} of {command[2:]}\n{done.stderr[-2500:]}", flush=True)
    print(f"   ({time.perf_counter() - begin:.0f} s)", flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of each checkpoint")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sections = options.sections or list(SECTIONS)
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    models, size = options.models, options.gigabytes
    references = models / "checksums"
    folders = [folder_of(models, seed, size) for seed in range(COUNT)]
    if options.make is not None:
        make(folder_of(models, options.make, size), configuration(size), options.make)
        return 0
    if options.alone or options.together:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.alone:
            alone(options.alone, references / f"{options.alone.name}.json")
        else:
            together(folders, references, sections)
        return 0
    import torch

    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(0), "torch", torch.__version__, flush=True)
    elif size >= 1:
        parser.exit(
            message="skipped: there is no GPU here; with --gigabytes 0.01 the program itself can be tried\n"
        )
    references.mkdir(parents=True, exist_ok=True)
    me = [sys.executable, __file__, str(models), *sections, "--gigabytes", str(size)]
    begin = time.perf_counter()
    makers = [subprocess.Popen([*me, "--make", str(seed)]) for seed in range(COUNT)]
    ended = [it.wait() for it in makers]
    print(f"made {COUNT} checkpoints in {time.perf_counter() - begin:.0f} s: {ended}", flush=True)
    # The first is timed; the others need not be.
    missing = [it for it in folders if not (references / f"{it.name}.json").exists()]
    well = all(run([*me, "--alone", str(it)]) for it in missing[:1])
    with ThreadPoolExecutor(COUNT) as pool:
        well = all(pool.map(lambda it: run([*me, "--alone", str(it)]), missing[1:])) and well
    return 0 if run([*me, "--together"]) and well else 1


if __name__ == "__main__":
    sys.exit(main())
