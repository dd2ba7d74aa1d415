"""The memory of its device that a runner may use: promised before it loads, counted while it is sized.

SGLang gives a runner's pool of keys and values what ``mem_fraction_static`` leaves of the memory that
the device had free before the weights were loaded (0.5.23, `measure_pre_model_load_memory`,
`_profile_available_bytes`). It reads the device's free memory for both, and so takes what its
neighbours load meanwhile, or loaded before, for its own. Here the first number is what the device had
free when its first runner came, and the second is that minus what this runner's tensors take. A
runner that has no neighbour, and no ``memory=``, reads what SGLang reads.

``memory=`` makes the device seem to be so large that ``mem_fraction_static`` of it is that amount. So
every formula of SGLang stays as it is.

The core keeps the accounts (rust/core/src/budgets.rs).
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context import generation
from sglang_distguard.distributed import nccl, world
from sglang_distguard.errors import DistGuardError, NotEnoughMemory, NotSupported
from sglang_distguard.runner.garbage import collect_before_load
from sglang_distguard.runner.handle import find_handle
from sglang_distguard.runner.memory import bytes_on
from sglang_distguard.sync.phases import in_phase

#: SGLang's unit: it reads free memory as a float of so many bytes.
_GIB = 1 << 30
#: The runner that is being sized, and whether others' promises limit it. It is not kept alive: threads
#: that are started inherit the value.
_sized: ContextVar[tuple[Optional[weakref.ref[Any]], bool]] = ContextVar(
    "sglang_distguard.sized", default=(None, False)
)


@contextmanager
def sizing(runner: Any, *, is_limited: bool = True) -> Iterator[None]:
    """Let SGLang read, in the with block, what its device has free for ``runner``.

    Args:
        runner: that is being built.
        is_limited: whether what others were promised limits a runner that was promised nothing.
    """
    token = _sized.set((weakref.ref(runner), is_limited))
    try:
        yield
    finally:
        _sized.reset(token)


def free_for_runner(
    read: Callable[[], float], device: str, gpu_id: int, reduce: Callable[[float], float]
) -> float:
    """Return what SGLang shall read as free memory of a device, in GiB.

    Args:
        read: reads what the device really has free; it also empties torch's cache.
        device, gpu_id: the device, as SGLang names it.
        reduce: makes the least of all ranks of it, where SGLang asks for that.
    """
    measured = read()
    reference, is_limited = _sized.get()
    runner = None if reference is None else reference()
    if runner is None or (device, gpu_id) != (runner.device, runner.gpu_id):
        return reduce(measured)
    handle = find_handle(runner)
    standing = None if handle is None else _core.standing_of(handle)
    if handle is None or standing is None or not standing.by_count:
        return reduce(measured)
    taken = _count(runner, handle) + standing.taken_beside
    free = standing.room - taken
    if is_limited and not standing.promised:
        # SGLang keeps 1 - mem_fraction_static of the room free; a pool is at most what others leave.
        kept = int(standing.room * (1 - generation.current().memory_fraction()))
        free = min(free, free - standing.others + kept)
    return reduce(max(free, 0) / _GIB)


def measure(runner: Any, read: Callable[[], Any]) -> None:
    """Let ``runner`` measure its device before it loads, and have its memory promised.

    Args:
        runner: its constructor is running.
        read: SGLang's function, which sets ``pre_model_load_memory``.

    Raises:
        NotEnoughMemory: less is left than it asks for. Nothing was loaded.
    """
    handle = find_handle(runner)
    if handle is None:
        read()
        return
    collect_before_load(runner.device, runner.gpu_id)
    known = _core.open_budget(handle, _name(runner))
    with sizing(runner, is_limited=False):
        read()
    found = int(runner.pre_model_load_memory * _GIB)
    room = _core.measured_room(_name(runner), found)
    if known is None and room != found and world.ranks() is None:
        # Another runner came at the same moment, and has begun to load since.
        runner.pre_model_load_memory = room / _GIB
    _promise(runner, handle, room)


def _promise(runner: Any, handle: _core.RunnerHandle, room: int) -> None:
    fraction = generation.current().memory_fraction()
    wish = settings.current().memory
    if wish is not None:
        asked = wish if isinstance(wish, int) else int(wish * _capacity(runner))
        said = f"memory={wish!r}"
        seeming = int(asked / fraction)
    else:
        # SGLang takes less of a pool that is limited in tokens, as a draft's is by its target's. How
        # much is known once it is there.
        limited = runner.server_args.max_total_tokens is not None or runner.is_draft_worker
        asked = 0 if limited else int(room * fraction)
        said = f"mem_fraction_static={fraction:g} of {_shown(room)}"
        seeming = None
    standing = _core.standing_of(handle)
    in_company = standing is not None and standing.by_count
    free = _free(runner) if in_company and asked else None
    refused = _core.promise_memory(handle, asked, free=free, room=seeming)
    if refused is not None and gc.collect():  # a runner that was closed by force or by its manager
        refused = _core.promise_memory(handle, asked, free=free, room=seeming)
    if refused is not None:
        raise _refusal(runner, handle, asked, said, fraction, refused)
    if seeming is not None:
        standing = _core.standing_of(handle)
        if (
            standing is not None and standing.room == seeming
        ):  # not a draft's, which its target pays
            runner.pre_model_load_memory = seeming / _GIB


def check_weights(runner: Any) -> None:
    """Refuse a pool for a runner whose weights alone take the memory that it was promised.

    Raises:
        NotEnoughMemory: they do, and the promise was made by ``memory=``.
    """
    handle = find_handle(runner)
    standing = None if handle is None else _core.standing_of(handle)
    if handle is None or standing is None:
        return
    taken = _count(runner, handle) + standing.taken_beside
    if settings.current().memory is None or not 0 < standing.promised <= taken:
        return
    raise NotEnoughMemory(
        f"runner '{handle.name}' was promised {_shown(standing.promised)} of {_name(runner)} for "
        f"weights and cache (memory={settings.current().memory!r}), and its weights take "
        f"{_shown(taken)}. Ask for more than {taken} bytes: what exceeds that is the cache's",
        runner=handle.name,
        device=_name(runner),
        asked=standing.promised,
        weights=taken,
        least=taken + 1,
    )


@contextmanager
def pooling(runner: Any) -> Iterator[None]:
    """Let SGLang size the pool of ``runner`` in the with block; note then what it takes with that."""
    with sizing(runner):
        yield
    handle = find_handle(runner)
    if handle is not None and _core.standing_of(handle) is not None:
        _count(runner, handle, sized=True)


def release_memory(timeout: Optional[float] = None) -> None:
    """Return the memory of dropped objects to the GPUs; torch would keep it.

    No other runner captures meanwhile: memory may not be freed then. Where that cannot be had in
    time, torch keeps it, and so it does where a kernel has failed and the GPU is lost.

    Args:
        timeout: seconds to wait for captures, and for NCCL; default: the setting in force.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    with suppress(DistGuardError, RuntimeError):
        with in_phase("load", timeout=timeout):
            gc.collect()  # modules refer to each other
        nccl.wait_for_destroyed(nccl.WAIT if timeout is None else min(timeout, nccl.WAIT))
        with in_phase("load", timeout=timeout):
            torch.cuda.empty_cache()


def _count(runner: Any, handle: _core.RunnerHandle, *, sized: bool = False) -> int:
    taken = bytes_on(runner.device, runner)
    _core.count_memory(handle, taken, sized=sized)
    return taken


def _name(runner: Any) -> str:
    """The device; CPUs of all NUMA nodes share their memory."""
    return "cpu" if runner.device == "cpu" else f"{runner.device}:{runner.gpu_id}"


def _free(runner: Any) -> Optional[int]:
    """What the device would have free if this process had no tensors there; None if not known."""
    if runner.device != "cuda":
        return None
    torch = sys.modules["torch"]
    free, _ = torch.cuda.mem_get_info(runner.gpu_id)
    return int(free) + int(torch.cuda.memory_reserved(runner.gpu_id))


def _capacity(runner: Any) -> int:
    """All the memory that the device has."""
    if runner.device == "cpu":
        import psutil  # SGLang depends on it

        return int(psutil.virtual_memory().total)
    if runner.device == "cuda":
        return int(sys.modules["torch"].cuda.get_device_properties(runner.gpu_id).total_memory)
    raise NotSupported(
        f"memory={settings.current().memory!r}: how much memory {_name(runner)} has is known of CPUs "
        "and CUDA devices only. Give memory in bytes, as an int",
        device=_name(runner),
    )


def _shown(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _refusal(
    runner: Any,
    handle: _core.RunnerHandle,
    asked: int,
    said: str,
    fraction: float,
    refused: tuple[int, int, list[tuple[str, int]]],
) -> NotEnoughMemory:
    room, left, promised = refused
    name = _name(runner)
    remedies = []
    if left > 0:
        part = int(left / room * 10_000) / 10_000
        remedies.append(
            f"ask for at most {left} bytes (memory={left}, or mem_fraction_static={part:g})"
        )
    if promised:
        to = ", ".join(f"'{who}' {_shown(size)}" for who, size in promised)
        users = f"of which were promised: {to}"
        remedies.append(
            "close one of those, or build them with less (memory=..., mem_fraction_static)"
        )
    else:
        users = "and no other runner was promised any of it"
    remedy = ", ".join(remedies) or f"free memory of {name} first"
    return NotEnoughMemory(
        f"runner '{handle.name}' asks for {_shown(asked)} of {name} ({said}), and {_shown(left)} are "
        f"left: runners may use {_shown(room)}, {users}. Nothing was loaded. "
        f"{remedy[0].upper()}{remedy[1:]}",
        runner=handle.name,
        device=name,
        asked=asked,
        left=left,
        room=room,
        promised=[{"runner": who, "bytes": size} for who, size in promised],
    )
