"""What the sections of ``gpu_breadth.py`` share: what a section is, checkpoints, and comparing."""

from __future__ import annotations

import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

#: How often each runner or engine computes beside the other.
ROUNDS = 20
#: Why a section cannot be tried on a CPU.
NO_CPU = "needs CUDA"
#: Said in the line of each section whose models use ``use_torchs_own_operations``.
NATIVE = (
    "norms, SiluAndMul, rotary embeddings and gate and up projections by torch's own operations"
)
#: Said in the line of each section whose models use ``leave_out_dual_gemm``.
KERNELS = "norms, SiluAndMul and rotary embeddings by SGLang's and flashinfer's own kernels"


@dataclass(frozen=True)
class Counted:
    """What a guarded part found.

    Attributes:
        wrong: how many answers had other bits than alone.
        total: how many answers were compared.
        note: what else the line of the section says.
    """

    wrong: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One feature of SGLang that runs alone and then with the guard.

    Attributes:
        name: names it on the command line and in its line.
        make: ``make(models, seed)`` writes the checkpoints with these random weights.
        alone: ``alone(models, seed)`` returns the answer of plain SGLang.
        guarded: ``guarded(models, expected)`` computes in one process; has one answer per seed.
        seeds: how many checkpoints there are.
        needs_cuda: whether it cannot run on a CPU.
        note: what else its line says.
        environment: variables of the environment of all its processes.
        limit: seconds for one of its parts on a GPU.
        processes: how many processes import SGLang at the same time, in a part alone.
    """

    name: str
    make: Callable[[Path, int], object]
    alone: Callable[[Path, int], Any]
    guarded: Callable[[Path, Sequence[Any]], Counted]
    seeds: int = 2
    needs_cuda: bool = False
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: float = 90.0
    processes: int = 1


def has_card() -> bool:
    """Whether there is a GPU."""
    import torch

    return torch.cuda.is_available()


def arguments(folder: Path, **settings: Any) -> Any:
    """``ServerArgs`` of one of two runners or engines on the device."""
    from sglang_distguard.testing import server_args

    # On a CPU SGLang takes what other processes of the machine use for this model's weights. On a
    # GPU the references of many sections are on the card at the same time.
    fraction = 0.45 if has_card() else 0.95
    given = {"dtype": "bfloat16", "mem_fraction_static": fraction, **settings}
    return server_args(folder, **given)


def checkpoint(models: Path, architecture: str, seed: int) -> Path:
    """Return the folder of a checkpoint of the catalog; write it unless it is there."""
    from sglang_distguard.testing.catalog import create

    return create(architecture, models / "catalog", seed=seed)


def made_of_llama(
    models: Path,
    kind: str,
    seed: int,
    write: Callable[[Path, dict[str, Any], Any, Path], object],
    *,
    base: Optional[Path] = None,
) -> Path:
    """Return a folder that is made of Llama's checkpoint with this seed; write it unless it is there.

    Args:
        models: folder of all checkpoints.
        kind: names what is made.
        seed: of the checkpoint and of the generator.
        write: called with the checkpoint's folder, its tensors, a generator, and the folder to fill.
        base: folder of the checkpoint; default: that of the catalog's Llama.
    """
    import torch
    from safetensors.torch import load_file

    target = models / kind / f"llama-{seed}"
    if not target.exists():
        base, scratch = base or checkpoint(models, "llama", seed), target.with_suffix(".new")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        generator = torch.Generator().manual_seed(seed)
        write(base, load_file(base / "model.safetensors"), generator, scratch)
        scratch.rename(target)
    return target


def is_fx_flag_of_the_process() -> bool:
    """Whether a thread that compiles stops all others at functions of `torch.compile`.

    torch 2.11.0 has one flag for tracing with `torch.fx` in the process, 2.14.1 one for each thread.
    With the former, functions are compiled in a row here, before the runners compute at once.
    """
    from torch.fx import _symbolic_trace

    return not hasattr(_symbolic_trace, "_is_fx_tracing_tls")


def install() -> None:
    """Install the guard in this process."""
    import sglang_distguard

    sglang_distguard.install()


def leave_out_dual_gemm() -> None:
    """Let Llama-like models run on a GPU without cutlass's Python package, from now on.

    SGLang 0.5.23 imports it to find out whether one kernel makes gate and up projections, which it
    does on no GPU before Blackwell: there, this changes nothing but the import.
    """
    if not has_card():
        return
    from sglang.srt.layers.dual_gemm import DualGemm

    def no_mode(*_: Any) -> None:
        return None

    setattr(DualGemm, "_select_mode", no_mode)


def use_torchs_own_operations() -> None:
    """Let Llama-like models run on a GPU without flashinfer's and cutlass's kernels, from now on.

    Their norms, activations and rotary embeddings use SGLang's own ``forward_native``. Fused writes
    of keys and values are off, because they are part of the fused rotary embedding, and so is the
    fused product of gate and up projection. It is the same for a process of plain SGLang and for
    one with the guard. On a CPU it changes nothing.
    """
    if not has_card():
        return
    leave_out_dual_gemm()
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.models import utils

    for kind in (RMSNorm, SiluAndMul, RotaryEmbedding):
        setattr(kind, "forward_cuda", kind.forward_native)

    fused = utils.enable_fused_set_kv_buffer

    def never(forward_batch: Any) -> bool:
        return False

    for name, module in list(sys.modules.items()):  # models import the function by its name
        if name.startswith("sglang.") and vars(module).get(fused.__name__) is fused:
            setattr(module, fused.__name__, never)


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, tensors bit for bit."""
    import torch
    from sglang_distguard.testing import bit_equal

    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and bit_equal(one, other)
    if isinstance(one, list):
        return (
            isinstance(other, list)
            and len(one) == len(other)
            and all(same(*it) for it in zip(one, other, strict=True))
        )
    return one == other


def has_nan(answer: Any) -> bool:
    """Whether an answer has values that are not numbers, which show nothing."""
    import torch

    if isinstance(answer, torch.Tensor):
        return bool(answer.isnan().any())
    if isinstance(answer, list):
        return any(map(has_nan, answer))
    return isinstance(answer, float) and math.isnan(answer)


def at_once(works: Sequence[Callable[[], Any]], limit: float = 80.0) -> list[Any]:
    """Call each function in a thread of its own, at the same moment; return what they return."""
    meet = threading.Barrier(len(works), timeout=limit)

    def one(work: Callable[[], Any]) -> Any:
        meet.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [it.result() for it in [pool.submit(one, work) for work in works]]


def wrong_of(ask: Callable[[], Any], expected: Any, rounds: int = ROUNDS) -> int:
    """How many of ``rounds`` answers differ from what is expected."""
    return sum(not same(ask(), expected) for _ in range(rounds))


class Asked:
    """Asks without a pause in a thread of its own, while the block runs, at least ``ROUNDS`` times.

    Attributes:
        wrong: how many answers differed from what is expected; complete after the block.
        total: how many answers there were.
    """

    def __init__(self, ask: Callable[[], Any], expected: Any) -> None:
        self._ask, self._expected = ask, expected
        self._is_over = threading.Event()
        self._failure: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._run)
        self.wrong = self.total = 0

    def _run(self) -> None:
        try:
            while self.total < ROUNDS or not self._is_over.is_set():
                self.wrong += not same(self._ask(), self._expected)
                self.total += 1
        except BaseException as error:
            self._failure = error

    def __enter__(self) -> Asked:
        self._thread.start()
        until = time.monotonic() + 60
        while not self.total and self._thread.is_alive() and time.monotonic() < until:
            time.sleep(0.002)  # what the block does shall happen between answers
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
