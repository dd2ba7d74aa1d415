"""Measures on one GPU what each runner of a process takes, beside others, and what it gives back.

``python verify/gpu_memory_by_runner.py MODELS [SECTION ...]`` makes an OPT of real size with random
weights in the folder MODELS (``--gigabytes``), builds it alone with plain SGLang in one process, and
runs the sections in another, with the guard. A section that fails does not end the others. Without a
GPU it says so and ends.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from gpu_loads import configuration, folder_of, make

MIB, GB = 2**20, 10**9
#: Of the card, for each of four runners.
QUARTER = 0.2
STEPS = 4
CYCLES = 50
#: How far the pool of a runner with neighbours may be from the one of plain SGLang alone: torch
#: rounds what it allocates, and plain SGLang takes what is rounded for the runner's.
CLOSE = 0.02
#: Seconds for one process.
LIMIT = 280.0


def say(*words: Any) -> None:
    print(*words, flush=True)


def settings(folder: Path, fraction: float, **others: Any) -> Any:
    from sglang_distguard.testing import server_args

    fields = {"max_total_tokens": None, "mem_fraction_static": fraction, **others}
    return server_args(folder, dtype="bfloat16", **fields)


def used() -> int:
    """MiB of the card that are in use, as the driver counts them."""
    import torch

    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int((total - free) // MIB)


def logits_of(runner: Any, **how: Any) -> Any:
    from sglang_distguard.testing import steps

    return steps.generate(runner, steps=STEPS, **how).logits


def facts(runner: Any) -> str:
    return (
        f"{runner.max_total_num_tokens} tokens; it reports {runner.weight_load_mem_usage:.2f} GiB of "
        f"weights, and {runner.pre_model_load_memory:.2f} GiB before"
    )


def alone(folder: Path, output: Path) -> None:
    """Build and run one runner with plain SGLang."""
    import torch
    from sglang_distguard.testing import steps

    runner = steps.build(settings(folder, QUARTER))
    torch.save(logits_of(runner), output / "alone.pt")
    (output / "alone.json").write_text(json.dumps({"tokens": runner.max_total_num_tokens}))
    say(f"plain SGLang alone, mem_fraction_static={QUARTER}: {facts(runner)}; card {used()} MiB")


class Sections:
    """The sections, by their names; each leaves no runner."""

    def __init__(self, models: Path, folder: Path, output: Path) -> None:
        import torch

        self.models, self.folder = models, folder
        self.tokens: Optional[int] = None
        self.logits: Any = None
        if (output / "alone.json").exists():
            self.tokens = json.loads((output / "alone.json").read_text())["tokens"]
            self.logits = torch.load(output / "alone.pt")

    def requests(self, count: int, fraction: float, **others: Any) -> list[Any]:
        from sglang_distguard import BuildRequest

        memory = others.pop("memory", [None] * count)
        return [
            BuildRequest(
                settings(self.folder, fraction, **others), name=f"r{index}", memory=memory[index]
            )
            for index in range(count)
        ]

    def built(self, requests: list[Any]) -> tuple[list[Any], list[BaseException]]:
        """Build at once; print what came out."""
        import sglang_distguard as dg

        begun = time.perf_counter()
        results = dg.build_runners(requests, progress=False)
        seconds = time.perf_counter() - begun
        runners = [it.runner for it in results if it.runner is not None]
        errors = [it.error for it in results if it.error is not None]
        say(f"  {len(runners)} of {len(results)} built in {seconds:.2f} s; card {used()} MiB")
        for result in results:
            if result.runner is not None:
                say(f"  {result.name}: {facts(result.runner)}")
            else:
                say(f"  {result.name}: {type(result.error).__name__}: {result.error}")
        return runners, errors

    def compare(self, runners: list[Any]) -> None:
        """Print how pools and logits compare with plain SGLang's alone."""
        import sglang_distguard as dg
        from sglang_distguard.testing import bit_equal

        if self.tokens is None:
            say("  nothing to compare with: plain SGLang alone was not run")
            return
        pools = [it.max_total_num_tokens for it in runners]
        far = max(abs(it / self.tokens - 1) for it in pools)
        wrong = sum(
            not bit_equal(logits_of(it, activate=dg.activate), self.logits) for it in runners
        )
        verdict = "ok" if far <= CLOSE and not wrong else "WRONG"
        say(
            f"  {verdict}: pools {pools}, alone {self.tokens} (at most {far:.2%} away); "
            f"{wrong} of {len(runners)} with other bits than alone"
        )

    def close(self, runners: list[Any], before: int) -> None:
        """Close; the caller still has the runners when the card is looked at."""
        import sglang_distguard as dg

        for runner in runners:
            dg.close(runner)
        kept = used() - before
        say(f"  closed, runners and errors still referred to: {kept:+d} MiB than before")

    def alone(self) -> None:
        """One runner, as plain SGLang builds it; closed, three times."""
        import sglang_distguard as dg

        for _ in range(3):
            before = used()
            runner = dg.build_runner(settings(self.folder, QUARTER), name="alone")
            say(f"  {facts(runner)}; card {used()} MiB")
            self.compare([runner])
            self.close([runner], before)

    def row(self) -> None:
        """Four in a row, all kept; a fifth that asks for too much; one more when one is closed."""
        import sglang_distguard as dg

        before, runners = used(), []
        for index in range(4):
            runners.append(dg.build_runner(settings(self.folder, QUARTER), name=f"row{index}"))
            say(f"  {facts(runners[-1])}; card {used()} MiB")
        begun = time.perf_counter()
        try:
            dg.build_runner(settings(self.folder, 0.3), name="fifth")
            say("  WRONG: the fifth was built")
        except dg.NotEnoughMemory as error:
            say(f"  refused after {time.perf_counter() - begun:.2f} s: {error}")
        dg.close(runners.pop(0))
        runners.append(dg.build_runner(settings(self.folder, QUARTER), name="again"))
        self.compare(runners)
        self.close(runners, before)

    def once(self) -> None:
        """Four at once."""
        before = used()
        runners, errors = self.built(self.requests(4, QUARTER))
        self.compare(runners)
        self.close(runners, before)
        del errors

    def capped(self) -> None:
        """Four at once with a large fraction and few tokens."""
        before = used()
        runners, errors = self.built(self.requests(4, 0.9, max_total_tokens=4096))
        self.close(runners, before)
        del errors

    def excess(self) -> None:
        """Four at once that ask for more than there is: some are refused, the others are right."""
        before = used()
        runners, errors = self.built(self.requests(4, 0.4))
        names = {type(it).__name__ for it in errors}
        say("  ok" if len(runners) == 2 and names == {"NotEnoughMemory"} else f"  WRONG: {names}")
        self.close(runners, before)

    def budget(self) -> None:
        """``memory=`` in bytes and as a fraction: kept, and the pool is the one alone."""
        import sglang_distguard as dg

        before = used()
        wishes: list[Any] = [0.1, 16 * GB, 20 * GB, 0.1]
        singles = []
        for wish in wishes[:3]:
            runner = dg.build_runner(settings(self.folder, 0.5), name="single", memory=wish)
            singles.append(runner.max_total_num_tokens)
            dg.close(runner)
        singles.append(singles[0])
        runners, errors = self.built(self.requests(4, 0.5, memory=wishes))
        for runner, wish, single in zip(runners, wishes, singles, strict=False):
            memory = dg.memory(runner)
            same = "ok" if runner.max_total_num_tokens == single else "WRONG"
            say(
                f"  {same}: memory={wish}: {runner.max_total_num_tokens} tokens, alone {single}; "
                f"weights {memory.weights / GB:.2f} GB, pools {memory.kv_cache / GB:.2f} GB"
            )
        self.close(runners, before)
        del errors

    def failed(self) -> None:
        """Builds that fail after the weights were loaded; their errors are kept."""
        import sglang_distguard as dg

        before, kept = used(), []
        for fraction, memory in ((0.01, None), (0.5, 1 * GB), (0.01, None)):
            results = dg.build_runners(
                [
                    dg.BuildRequest(
                        settings(self.folder, fraction), name=f"f{index}", memory=memory
                    )
                    for index in range(2)
                ],
                progress=False,
            )
            kept += [it.error for it in results]
            error = kept[-1]
            say(f"  {type(error).__name__}: {str(error)[:160]}")
            say(f"  errors kept: {used() - before:+d} MiB than before")
        say("  ok" if used() - before < 512 else "  WRONG")

    def cycles(self) -> None:
        """A small runner with graphs, built, run and closed again and again."""
        import sglang_distguard as dg
        from sglang_distguard.testing import create_model, graphs

        folder, left = create_model("gpt2", self.models), []
        options = {**graphs.CUDA_GRAPHS, "max_total_tokens": 4096}
        begun = time.perf_counter()
        for _ in range(CYCLES):
            runner = dg.build_runner(settings(folder, 0.05, **options), name="cycle")
            logits_of(runner, activate=dg.activate)
            dg.close(runner)
            del runner
            left.append(used())
            if len(left) % 10 == 0:
                say(f"  after {len(left)}: {left[-1]} MiB in use")
        grown = left[-1] - left[9]
        say(f"  {CYCLES} cycles in {time.perf_counter() - begun:.0f} s; MiB after each: {left}")
        say(f"  {'ok' if abs(grown) <= 64 else 'WRONG'}: {grown:+d} MiB since the tenth")
        say(f"  {threading.active_count()} threads")


ORDER = ("alone", "row", "once", "capped", "excess", "budget", "failed", "cycles")


def guarded(models: Path, folder: Path, output: Path, sections: Sequence[str]) -> int:
    """Run the sections; return how many raised."""
    import sglang_distguard as dg
    import torch
    from sglang_distguard.testing import create_model

    dg.install()
    warm = dg.build_runner(settings(create_model("opt", models), 0.05, max_total_tokens=4096))
    logits_of(warm, activate=dg.activate)
    dg.close(warm)
    del warm
    free, total = torch.cuda.mem_get_info()
    say(f"the card has {total / GB:.2f} GB, {free / GB:.2f} GB free beside this process")
    every = Sections(models, folder, output)
    failures = 0
    for name in sections:
        work = getattr(every, name)
        say(f"{name}: {work.__doc__}")
        begun = time.perf_counter()
        try:
            work()
        except BaseException:
            failures += 1
            say("  FAILED: " + "\n  ".join(traceback.format_exc().strip().splitlines()[-8:]))
        _close_all(dg)
        gc.collect()
        torch.cuda.empty_cache()
        say(f"  ({time.perf_counter() - begun:.1f} s; card {used()} MiB)")
    return failures


def _close_all(dg: Any) -> None:
    """Close the runners that a failed section has left."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    for it in gc.get_objects():
        if type(it) is ModelRunner:
            try:
                dg.close(it, force=True)
            except Exception as error:
                say(f"  not closed: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(ORDER))
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the model")
    parser.add_argument("--part", choices=["alone", "guarded"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sections = options.sections or list(ORDER)
    unknown = [it for it in sections if it not in ORDER]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(ORDER)}")
    import torch

    if not torch.cuda.is_available():
        say("skipped: there is no GPU here")
        return 0
    if options.part:
        from sglang_distguard.testing import prepare_environment

        prepare_environment()
        if options.part == "alone":
            alone(options.folder, options.folder)
            return 0
        return guarded(options.models, options.folder, options.folder, sections)
    begun = time.perf_counter()
    say(torch.cuda.get_device_name(0), "torch", torch.__version__)
    folder = folder_of(options.models, 0, options.gigabytes)
    make(folder, configuration(options.gigabytes), 0)
    size = sum(it.stat().st_size for it in folder.glob("*.safetensors"))
    say(f"a model of {size / GB:.2f} GB after {time.perf_counter() - begun:.0f} s")
    failed = 0
    for part in ("alone", "guarded"):
        command = [sys.executable, __file__, str(options.models), *sections]
        command += ["--part", part, "--folder", str(folder)]
        try:  # its output is seen as it comes, also if the time ends
            code = subprocess.run(command, timeout=LIMIT).returncode
        except subprocess.TimeoutExpired:
            code = -1
            say(f"{part}: not at its end after {LIMIT:.0f} s")
        failed += bool(code)
    say(f"all after {time.perf_counter() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
