"""What the long checks of engines share: models, requests with their answers alone, what is left.

The answers are those of plain `sgl.Engine`, one request after the other, in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

from sglang_distguard.testing import create_model, prepare_environment, server_args
from sglang_distguard.testing.catalog import CATALOG
from sglang_distguard.testing.children import fork

CACHE = Path(__file__).resolve().parent.parent / ".cache"
#: Seconds; nothing here takes more than a small fraction of it on a busy machine.
MANY = 300.0


def _enliven(model: Any) -> None:
    """Make the answers depend on the whole prompt; with small weights a model repeats one token."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(8.0)


@dataclass(frozen=True)
class Kind:
    """A model and the settings with which it is served."""

    architecture: str
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    def folder(self, seed: int) -> Path:
        """Its checkpoint with these random weights."""
        builders = {self.architecture: CATALOG[self.architecture].builder}
        return create_model(
            self.architecture, CACHE / "lively", seed=seed, builders=builders, adjust=_enliven
        )

    def args(self, seed: int) -> Any:
        """Its ``ServerArgs``."""
        settings = {
            "sleep_on_idle": True,
            # safetensors 0.8.0 leaks two small objects per tensor that it maps.
            "weight_loader_disable_mmap": True,
            # SGLang takes what other processes of the machine use for this model's weights.
            "mem_fraction_static": 0.95,
            **self.settings,
        }
        return server_args(self.folder(seed), dtype=self.dtype, **settings)


#: With and without prefix cache, prefill in chunks, and SGLang's overlapping schedule.
KINDS = (
    Kind("gpt2"),
    Kind("llama", settings={"disable_radix_cache": False, "chunked_prefill_size": 16}),
    Kind("opt", settings={"disable_overlap_schedule": False}),
    Kind("mixtral"),
    Kind("qwen3", settings={"disable_radix_cache": False, "disable_overlap_schedule": False}),
    Kind("gemma2"),
)
SEEDS = (0, 1)


@dataclass(frozen=True)
class Question:
    """A request. A sampled one is drawn from one token, so that its answer is one, too."""

    prompt: tuple[int, ...]
    tokens: int
    is_sampled: bool

    def params(self) -> dict[str, Any]:
        how = {"temperature": 0.8, "top_k": 1} if self.is_sampled else {"temperature": 0}
        return {**how, "max_new_tokens": self.tokens, "ignore_eos": True}

    def given(self) -> dict[str, Any]:
        """Arguments of ``generate``."""
        return {"input_ids": list(self.prompt), "sampling_params": self.params()}


def _questions() -> tuple[Question, ...]:
    chosen = random.Random(20)
    common = [chosen.randrange(1, 990) for _ in range(24)]  # a prefix for the cache to find
    made = []
    for number in range(12):
        own = [chosen.randrange(1, 990) for _ in range(chosen.randint(1, 40))]
        prompt = common[: chosen.randint(4, 24)] + own if number % 3 == 0 else own
        made.append(Question(tuple(prompt), chosen.randint(1, 24), number % 4 == 1))
    return tuple(made)


QUESTIONS = _questions()
#: Many tokens, so that the request still runs when it is aborted.
LONG = Question((5, 6, 7, 8), 120, False)
ALL = (*QUESTIONS, LONG)
Answers = tuple[tuple[int, ...], ...]


def answers_alone(kind: Kind, seed: int) -> Answers:
    """The tokens of ``ALL`` from plain ``sgl.Engine``; call it before threads are started."""
    # A process that has made a model has OpenMP's threads, and its forked children hang.
    _in_child(f"the checkpoint of {kind.architecture}", lambda: kind.folder(seed))
    facts = [asdict(kind), seed, [asdict(it) for it in ALL], version("sglang"), version("torch")]
    weights = [it.read_bytes() for it in sorted(kind.folder(seed).glob("*.safetensors"))]
    text = json.dumps(facts, sort_keys=True).encode()
    name = hashlib.sha256(b"".join([text, *weights])).hexdigest()[:16]
    file = CACHE / "engines" / f"{kind.architecture}-{seed}-{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        _in_child(f"plain sgl.Engine of {kind.architecture}", lambda: _ask_plain(kind, seed, file))
    return tuple(tuple(it) for it in json.loads(file.read_text()))


def _in_child(what: str, work: Callable[[], object]) -> None:
    def limited() -> None:
        signal.alarm(int(MANY))  # ends the child, and its own children with it, wherever it hangs
        work()

    _, status = os.waitpid(fork(limited), 0)
    if status != 0:
        code = os.waitstatus_to_exitcode(status)
        raise RuntimeError(f"{what} failed: exit code {code} (-14: no end in {MANY:g} s)")


def _ask_plain(kind: Kind, seed: int, file: Path) -> None:
    from sglang.srt.entrypoints import engine as sgl

    # Its processes are forked from this one, which has SGLang's stub of sgl_kernel.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_args, **_kwargs: None  # type: ignore[assignment]
    engine: Any = sgl.Engine(server_args=kind.args(seed))
    try:
        found = [engine.generate(**it.given())["output_ids"] for it in ALL]
    finally:
        engine.shutdown()
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(found))
    scratch.rename(file)


#: Files in shared memory that this process has opened.
_shared: set[str] = set()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).startswith("/dev/shm/"):
        _shared.add(str(arguments[0]))


def begin() -> None:
    """Prepare SGLang in this process; its temporary files have a folder of their own."""
    from sglang_distguard.testing.solo import import_sglang

    tempfile.tempdir = tempfile.mkdtemp(prefix="dg-")
    sys.addaudithook(_note)
    prepare_environment()
    import_sglang()


def _name(thread: threading.Thread) -> str:
    """Its name without the number that Python gives to threads without one."""
    return re.sub(r"^Thread-\d+", "Thread", thread.name)


def _watchdogs() -> int:
    return sum("_watchdog_thread" in it.name for it in threading.enumerate())


@dataclass(frozen=True)
class Left:
    """What this process holds between two rounds."""

    threads: tuple[str, ...]
    descriptors: int
    files: tuple[str, ...]
    scopes: int
    runners: int
    tensors: int
    tensor_bytes: int
    blocks: int  # of CPython's allocator
    rss: float  # MiB

    @staticmethod
    def now(engines: int = 0) -> Left:
        """Look, after everything that can be freed is freed; ``engines``: how many are open."""
        import torch
        from sglang_distguard import _core

        until = time.monotonic() + MANY  # watchdogs are told to end, and not waited for
        while _watchdogs() > engines and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(2):
            gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        storages: dict[int, int] = {}
        tensors = 0
        for it in gc.get_objects():
            if issubclass(type(it), torch.Tensor):
                tensors += 1
                if it.device.type == "cpu" and it.layout is torch.strided:
                    storage = it.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        sockets = sorted(it.name for it in Path(tempfile.gettempdir()).glob("tmp*"))
        return Left(
            threads=tuple(sorted(map(_name, threading.enumerate()))),
            descriptors=len(os.listdir("/proc/self/fd")),
            files=(*sockets, *(it for it in sorted(_shared) if os.path.exists(it))),
            scopes=len(_core.live_scopes()),
            runners=sum(_core.live_runners(scope) for scope in [None, *_core.live_scopes()]),
            tensors=tensors,
            tensor_bytes=sum(storages.values()),
            blocks=sys.getallocatedblocks(),
            rss=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        )

    def more_than(self, before: Left) -> list[str]:
        """What is here that was not there ``before``, apart from memory that CPython's or C's allocator may keep."""
        found = []
        threads = Counter(self.threads) - Counter(before.threads)
        if threads:
            found.append(f"threads {sorted(threads.elements())}")
        files = sorted(set(self.files) - set(before.files))
        if files:
            found.append(f"files {files}")
        for name in ("descriptors", "scopes", "runners", "tensors", "tensor_bytes"):
            then, now = getattr(before, name), getattr(self, name)
            if now > then:
                found.append(f"{name} {then} -> {now}")
        return found


def machine() -> str:
    """Cores, processor and load, for the head of a page."""
    models = [it for it in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in it]
    model = models[0].partition(":")[2].strip() if models else "unknown processor"
    load: Optional[float] = os.getloadavg()[0]
    return f"{len(os.sched_getaffinity(0))} cores of {model}, load {load:.1f} at the begin"
