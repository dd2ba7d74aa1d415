"""Compares runners with CUDA graphs, run at once on one GPU, with each alone, bit for bit.

``python verify/gpu.py MODELS`` makes small checkpoints in the folder MODELS. Each part has its own
process. The parts are each runner alone with plain SGLang, twice; all runners with the guard; and
all runners with the guard but without one treatment, to show that it is needed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Architectures with one vocabulary, whose kernels do not need flashinfer's compiler.
MEMBERS: tuple[str, ...] = ("gpt2-0", "gpt2-1", "opt-0", "opt-1")
ROUNDS = 50
STEPS = 8
WITHOUT = ("", "GraphSharedOutput._process_shared", "_forward_input_buffer_pool")


def build(models: Path, name: str, **options: Any) -> Any:
    from sglang_distguard.testing import graphs, server_args, steps

    settings = {**graphs.CUDA_GRAPHS, "mem_fraction_static": 0.1}
    return steps.build(server_args(models / name, dtype="bfloat16", **settings), **options)


def logits_of(runner: Any, **how: Any) -> Any:
    from sglang_distguard.testing import steps

    return steps.generate(runner, steps=STEPS, **how).logits


def make_models(parser: argparse.ArgumentParser, models: Path) -> None:
    """Make the checkpoints of ``MEMBERS``, and print the card; end the program without a GPU."""
    import torch
    from sglang_distguard.testing import create_model

    if not torch.cuda.is_available():
        parser.exit(message="skipped: there is no GPU here\n")
    for name in MEMBERS:
        architecture, _, seed = name.rpartition("-")
        create_model(architecture, models, seed=int(seed))
    print(torch.cuda.get_device_name(0), "torch", torch.__version__)


def alone(models: Path, name: str, output: Path) -> None:
    """Build and run one runner with plain SGLang."""
    import torch

    runner = build(models, name)
    torch.save(logits_of(runner), output)
    print(f"{name}: {type(runner.decode_cuda_graph_runner).__name__}")


def together(models: Path, references: Path, without: str) -> None:
    """Build and run each runner in its own thread; print how many generations had other bits."""
    import sglang_distguard
    import torch
    from sglang_distguard.hooks import process_globals
    from sglang_distguard.testing import bit_equal

    process_globals.TREATMENTS = tuple(
        row for row in process_globals.TREATMENTS if row.name != without
    )
    sglang_distguard.install()
    meet = threading.Barrier(len(MEMBERS))
    wrong: list[int] = []
    errors: list[str] = []

    def work(name: str) -> None:
        try:
            expected = torch.load(references / f"{name}.pt")
            meet.wait()
            with sglang_distguard.runner_scope(name):
                runner = build(models, name)
            meet.wait()
            made = [logits_of(runner, activate=sglang_distguard.activate) for _ in range(ROUNDS)]
            wrong.append(sum(not bit_equal(it, expected) for it in made))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
            meet.abort()

    threads = [threading.Thread(target=work, args=(name,)) for name in MEMBERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{sum(wrong)} of {len(wrong) * ROUNDS} generations with other bits", *errors, sep="; ")


def parts(models: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (label, arguments) of every process, in order."""
    for name in MEMBERS:
        yield f"{name} alone", ["--alone", name, "--output", str(folder / f"{name}.pt")]
        yield f"{name} again", ["--alone", name, "--output", str(folder / f"{name}.again")]
    for without in WITHOUT:
        said = f"guarded without {without}" if without else "guarded"
        yield said, ["--together", "--output", str(folder), "--without", without]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--alone", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone or options.together:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.alone:
            alone(options.models, options.alone, options.output)
        else:
            together(options.models, options.output, options.without)
        return 0
    import torch

    make_models(parser, options.models)
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        for said, arguments in parts(options.models, folder):
            command = [sys.executable, __file__, str(options.models), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=280)
            print(
                f"{said}: {(done.stdout.strip().splitlines() or ['nothing printed'])[-1]}",
                flush=True,
            )
            if done.returncode:
                print(done.stderr[-3000:])
        for name in MEMBERS:  # otherwise nothing could be compared
            one, two = (torch.load(folder / f"{name}.{it}") for it in ("pt", "again"))
            print(f"{name}: the same bits twice alone: {torch.equal(one, two)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
