"""Loads whose weights go to the GPU from registered files (``mapped_files``), as SGLang asks.

SGLang's own loaders take the tensors and copy them; only the memory that the tensors lie in is
another. They must not be written: the mapping is read only, and the process would end. So only the
loads of a model itself are served, of SGLang's own models, onto one CUDA device: there, what a
loader keeps is a copy.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard.config import settings
from sglang_distguard.runner.mapped_files import (
    Identity,
    MappedFile,
    MappedFiles,
    NotMapped,
    NotRegistered,
)

if TYPE_CHECKING:
    import torch

    Weight = tuple[str, torch.Tensor]

#: Packages whose models were read for writes into loaded weights (tests/test_pinned_loads.py looks
#: for them in the installed release).
MODELS = "sglang.srt.models."
#: Models that write into a loaded weight of two dimensions (0.5.21 to 0.5.23: `w2_weight_bias`).
WRITERS = frozenset({"GptOssForCausalLM"})
#: Files of one load that are registered before they are read, and that stay so after it, for loads
#: of the same checkpoint that are behind.
AHEAD = 3
KEPT = 4
#: Limits of the control group, of either version.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
#: `cudaHostRegisterReadOnly` (CUDA 11.1 and later).
_READ_ONLY = 0x08
_log = logging.getLogger("sglang_distguard")
#: Index of the CUDA device onto which the running code loads a model from registered files.
_device: ContextVar[Optional[int]] = ContextVar("sglang_distguard.pinned_load", default=None)


class _Refusal:
    """Why files are no longer registered in this process, once that has failed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reason: Optional[str] = None

    def note(self, reason: str) -> None:
        """Note it, and log it the first time."""
        with self._lock:
            is_first = self.reason is None
            self.reason = self.reason or reason
        if is_first:
            _log.warning(
                "weights are loaded as SGLang does it, without registering their files with CUDA, "
                "so that concurrent loads take turns: %s. pinned_loads=False avoids the attempt",
                reason,
            )


def most_bytes() -> int:
    """How much memory may be registered at a time: half of what the process may have."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in _LIMITS:
        try:
            most = min(most, int(limit.read_text()))
        except (OSError, ValueError):  # no such control group, or no limit: "max"
            pass
    return most // 2


def _register(address: int, length: int) -> None:
    import torch

    runtime: Any = torch.cuda.cudart()
    pages = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    # torch releases the interpreter's lock in the call (2.11).
    code = int(runtime.cudaHostRegister(address, pages, _READ_ONLY))
    if code:
        _forget_error()
        raise NotRegistered(f"cudaHostRegister of {length} bytes failed with error {code}")


def _unregister(address: int) -> None:
    import torch

    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostUnregister(address)):
        _forget_error()


def _forget_error() -> None:
    """Take CUDA's last error, which the next kernel's launch would report as its own."""
    import torch

    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        pass


FILES = MappedFiles(_register, _unregister, most_bytes)
_refusal = _Refusal()


def refused() -> Optional[str]:
    """Why files are no longer registered in this process; None: they are."""
    return _refusal.reason


def device_for(model: torch.nn.Module) -> Optional[int]:
    """The index of the CUDA device onto which ``model`` is loaded from registered files.

    None where it is loaded as SGLang does it.
    """
    import torch

    if not settings.current().pinned_loads or _refusal.reason or torch.version.cuda is None:
        return None
    return _served(type(model), {it.device for it in model.parameters()})


def _served(kind: type, devices: Set[torch.device]) -> Optional[int]:
    """The index of the one CUDA device in ``devices``, for a class of models that is served."""
    named = {it.__name__ for it in kind.__mro__}
    if not kind.__module__.startswith(MODELS) or named & WRITERS:
        return None
    # A weight that stays on the host may be the loaded tensor itself.
    if len(devices) != 1:
        return None
    (device,) = devices
    return device.index if device.type == "cuda" else None


def loading_onto() -> Optional[int]:
    """The device of the running load, if its files are to be registered."""
    return _device.get()


def onto(device: int, items: Generator[Weight, None, None]) -> Iterator[Weight]:
    """Yield ``items``; what makes each of them runs as a load onto ``device``."""
    try:
        while True:
            token = _device.set(device)  # not while the consumer runs
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                _device.reset(token)
            yield item
    finally:
        items.close()


def weights_of(
    paths: Sequence[str],
    device: int,
    *,
    sorts: bool,
    after_each: Callable[[], object],
    files: MappedFiles = FILES,
) -> Iterator[Weight]:
    """Yield the weights of files, in memory that is registered with CUDA where that is possible.

    At most ``AHEAD + KEPT + 1`` files are registered for one load at a time.

    Args:
        paths: of files of safetensors.
        device: index of the CUDA device onto which they are loaded; negative: none, as in torch.
        sorts: whether the names of a file are sorted, or in the order of safetensors.
        after_each: called when the weights of a file were taken.
        files: the files that are mapped now.
    """
    seconds = settings.current().timeout
    timeout = None if math.isinf(seconds) else seconds
    pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="distguard-load")
    waiting = deque(paths)
    coming: deque[Future[Optional[MappedFile]]] = deque()
    held: deque[MappedFile] = deque()
    releasing: Optional[Future[None]] = None
    try:
        for path in paths:
            if releasing is not None:  # otherwise more files would be registered
                releasing.result()
            while waiting and len(coming) <= AHEAD:
                coming.append(pool.submit(_acquired, files, waiting.popleft(), device, timeout))
            # An interrupt at any point leaves it in one of the two, for the end of the load.
            file = coming[0].result()
            if file is not None:
                held.append(file)
            coming.popleft()
            yield from _weights(path, file, sorts=sorts)
            after_each()
            if len(held) > KEPT:
                releasing = pool.submit(_released, files, held.popleft(), device)
    finally:
        for future in coming:
            file = None if future.cancel() else future.result()
            if file is not None and not any(it is file for it in held):
                held.append(file)
        # Before the load ends, because unregistering may not meet a capture of graphs.
        for file in held:
            pool.submit(_released, files, file, device)
        pool.shutdown()


def _acquired(
    files: MappedFiles, path: str, device: int, timeout: Optional[float]
) -> Optional[MappedFile]:
    """``files.acquire``; None where the file is to be read as SGLang does it."""
    if _refusal.reason:
        return None
    try:
        with _on(device):
            return files.acquire(path, timeout)
    except (NotRegistered, TimeoutError) as error:
        _refusal.note(f"{path}: {error or 'another thread did not end registering it'}")
    except (NotMapped, OSError) as error:  # SGLang's own reading says what is wrong with it
        _log.debug("%s is not registered with CUDA: %s", path, error)
    except Exception as error:  # it is an attempt to be faster, and no reason to fail
        _refusal.note(f"{path}: {error!r}")
    return None


def _released(files: MappedFiles, file: MappedFile, device: int) -> None:
    import torch

    with _on(device):
        try:
            if device >= 0:
                # A loader may copy without waiting: to CUDA, registered memory is pinned.
                torch.cuda.synchronize(device)
        finally:
            files.release(file)


def _on(device: int) -> AbstractContextManager[object]:
    """Make ``device`` current: a pool's thread is on device 0, and would make a context there."""
    import torch

    return torch.cuda.device(device)


def _weights(path: str, file: Optional[MappedFile], *, sorts: bool) -> Iterator[Weight]:
    import safetensors

    with safetensors.safe_open(path, framework="pt", device="cpu") as opened:
        # Otherwise the path has become another file's since this one was mapped.
        is_same = file is not None and Identity.of(os.stat(path)) == file.identity
        names = opened.keys()
        for name in sorted(names) if sorts else names:
            weight = opened.get_tensor(name)
            if file is not None and is_same:
                weight = file.tensor(name, weight)
            yield name, weight
