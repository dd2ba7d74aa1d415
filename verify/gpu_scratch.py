"""Kernels of flashinfer in two scopes, at once on two streams of one GPU: whose scratch memory they use.

``python verify/gpu_scratch.py`` captures a graph of each kernel in each of two scopes, with input of
its own, replays both at once, and compares each output bit for bit with the kernel's when it runs
alone; those of the kernel that adds in any order, by their first digits. Then the same with one
scope for both, which have one scratch memory then, as without the row
``flashinfer.utils._cache_buf``. A kernel that waits for itself there may never end, so that each of
the two is a process of its own. flashinfer compiles the kernels with nvcc.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import sglang_distguard
from gpu_breadth_common import has_card
from gpu_loads import run
from sglang_distguard import _core

#: Kernels in a graph, and how often both graphs run at once.
CALLS, ROUNDS = 100, 20
#: Rows and entries of the input: few rows of a large vocabulary, for which several blocks of
#: threads work on one row, and tell each other results through the scratch memory.
ROWS, VOCABULARY = 4, 151_936
TOP = 40
#: The kernel whose sums have other last bits each time, also alone.
ROUNDED = "top_k_renorm_probs"


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


def compare(scopes: Sequence[Any]) -> tuple[int, int]:
    """Print how many outputs are wrong, for each kernel; return their sums, at once and in a row."""
    wrong_at_once, wrong_in_a_row = 0, 0
    for name, kernel in kernels().items():
        sides = [Side(seed, scope) for seed, scope in enumerate(scopes)]
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
        told = f"{wrong} of {total} other than alone; one after the other {alone}"
        print(f"{name}: {told}", flush=True)
        wrong_at_once, wrong_in_a_row = wrong_at_once + wrong, wrong_in_a_row + alone
    return wrong_at_once, wrong_in_a_row


def apart() -> int:
    """Give each its scope; return whether any output is wrong."""
    print("a scope for each:", flush=True)
    return int(compare([_core.new_scope("first"), _core.new_scope("second")]) != (0, 0))


def shared() -> int:
    """Give both one scope; return 0."""
    print("one scope for both:", flush=True)
    wrong, _ = compare([_core.new_scope("of both")] * 2)
    if not wrong:
        print("no kernel is wrong in one scope here: the run shows nothing", flush=True)
    return 0


PARTS = {"apart": apart, "shared": shared}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not has_card():
        print("skipped: there is no GPU here")
        return 0
    if given.run is not None:
        sglang_distguard.install()
        return PARTS[given.run]()
    is_right, _ = [run([sys.executable, __file__, "--run", part]) for part in PARTS]
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
