"""Kernels of flashinfer in two scopes, at once on two streams of one GPU: whose scratch memory they use.

``python verify/gpu_scratch.py`` captures a graph of each kernel in each of two scopes, with input of
its own, replays both at once, and compares each output bit for bit with the kernel's when it runs
alone; those of the kernel that adds in any order, by their first digits. Then the same with one scope for both, which have one scratch memory then, as without the
row ``flashinfer.utils._cache_buf``. A kernel that waits for itself there may never end, so
that each of the two is a process of its own. flashinfer compiles the kernels with nvcc.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

#: Kernels in a graph, and how often both graphs run at once.
CALLS, ROUNDS = 100, 20
#: Rows and entries of the input: few rows of a large vocabulary, for which several blocks of
#: threads work on one row, and tell each other results through the scratch memory.
ROWS, VOCABULARY = 4, 151_936
TOP = 40
#: The kernel whose sums have other last bits each time, also alone.
ROUNDED = "top_k_renorm_probs"
#: Seconds for one process, which compiles.
LIMIT = 200.0


def kernels() -> dict[str, Callable[[Any], Any]]:
    """Functions of flashinfer that SGLang or users call, by name; each has scratch memory."""
    from flashinfer import sampling

    return {
        "softmax": sampling.softmax,
        "top_k_mask_logits": lambda logits: sampling.top_k_mask_logits(logits, TOP),
        "top_k_renorm_probs": lambda logits: sampling.top_k_renorm_probs(logits.softmax(-1), TOP),
    }


class Side:
    """One scope with its stream, its input and its graph."""

    def __init__(self, seed: int, scope: Any) -> None:
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)
        size = ROWS, VOCABULARY
        self.given = torch.randn(size, generator=generator, device="cuda")
        self.scope = scope
        self.stream = torch.cuda.Stream()
        self.expected: Any = None
        self.graph: Any = None
        self.found: list[Any] = []

    def capture(self, kernel: Callable[[Any], Any]) -> None:
        import torch
        from sglang_distguard import _core

        with _core.in_scope(self.scope), torch.cuda.stream(self.stream):
            self.expected = kernel(self.given).clone()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = [kernel(self.given) for _ in range(CALLS)]

    def replay(self) -> None:
        import torch

        with torch.cuda.stream(self.stream):
            for it in self.found:
                it.fill_(-1)  # what an earlier replay has written proves nothing
            self.graph.replay()
        self.stream.synchronize()

    def wrong(self, name: str) -> int:
        import torch

        same = torch.allclose if name == ROUNDED else torch.equal
        return sum(not same(it, self.expected) for it in self.found)


def compare(*, is_shared: bool) -> None:
    """Print how many outputs are wrong, for each kernel."""
    import sglang_distguard
    from sglang_distguard import _core

    sglang_distguard.install()
    scopes = [_core.new_scope("first"), _core.new_scope("second")]
    for name, kernel in kernels().items():
        sides = [Side(seed, scopes[0 if is_shared else seed]) for seed in range(2)]
        for side in sides:
            side.capture(kernel)
        for side in sides:
            side.replay()
        alone = sum(side.wrong(name) for side in sides)
        wrong = 0
        for _ in range(ROUNDS):
            with ExitStack() as threads:
                for side in sides:
                    thread = threading.Thread(target=side.replay)
                    thread.start()
                    threads.callback(thread.join)
            wrong += sum(side.wrong(name) for side in sides)
        total = ROUNDS * len(sides) * CALLS
        print(
            f"{name}: {wrong} of {total} other than alone; one after the other {alone}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=["apart", "shared"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("skipped: there is no GPU here")
        return 0
    if given.run is not None:
        compare(is_shared=given.run == "shared")
        return 0
    outputs = {}
    for what in ("apart", "shared"):
        command = [sys.executable, __file__, "--run", what]
        try:
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
            outputs[what] = ran.stdout, ran.returncode
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
            outputs[what] = said if isinstance(said, str) else said.decode(), -1
        text, code = outputs[what]
        titles = {"apart": "a scope for each", "shared": "one scope for both"}
        ended = "" if code == 0 else f" (it ended with {code}; -1: not within {LIMIT:g} s)"
        print(f"{titles[what]}{ended}:\n{text}", flush=True)
    if outputs["shared"][0].count(": 0 of ") == len(kernels()):
        print("no kernel uses the scratch memory here: the run shows nothing", flush=True)
    text, code = outputs["apart"]
    lines = text.splitlines()
    is_right = all(": 0 of " in it and it.endswith("other 0") for it in lines)
    return int(code != 0 or len(lines) != len(kernels()) or not is_right)


if __name__ == "__main__":
    sys.exit(main())
