"""How each public method of the installed ``sgl.Engine`` works in ``Engine``: the table of the docs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.refusals import ONE_BY_ONE, REFUSED, REFUSED_ON_CPU
from sglang_distguard.engines.weights import HasWeights

_DIFFERENT = {
    "generate": "requests of any number of threads at a time",
    "async_generate": "from any asyncio loop; cancelling the caller aborts the request",
    "shutdown": "as `close()`; ends this engine alone",
    "start_profile": (
        "from any thread; one engine at a time, for torch has one profiler in a process: for "
        "another one it raises `RuntimeError`, which names the first"
    ),
}
_SYNC = "from any thread, any number at a time"
_ASYNC = "from any asyncio loop"
_QUEUED = "from any thread; one call after another"
_LORA = (
    "without `enable_lora`, which opens no engine on a CPU: SGLang pins memory "
    "(`lora/layers.py:479`, `lora/backend/torch_backend.py:225`)"
)
_RECORD = (
    "yes; on a CPU only while it records: a forward without that asks CUDA "
    "(`eplb/expert_distribution.py:325`)"
)
#: What ``tests/test_engines*.py`` do not show of a method, and the line of SGLang (0.5.23) why.
LIMITS = {
    **dict.fromkeys(
        (
            *("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"),
            *("async_load_lora_adapter", "async_unload_lora_adapter"),
        ),
        _LORA,
    ),
    **dict.fromkeys(
        (
            *("start_expert_distribution_record", "stop_expert_distribution_record"),
            "dump_expert_distribution_record",
        ),
        _RECORD,
    ),
    **dict.fromkeys(REFUSED_ON_CPU, "refused on a CPU; not run on a GPU"),
    "update_weights_from_ipc": (
        "the answer without checkpoint_engine, which finds engines by the ids of their GPUs "
        "(`checkpoint_engine/checkpoint_engine_worker.py:116`)"
    ),
    "save_remote_model": (
        "the refusal of an address: SGLang saves to servers of Redis, S3 and Azure only "
        "(`connector/__init__.py:36`)"
    ),
}


def methods() -> Iterator[tuple[str, str, str]]:
    """Yield (name, signature, how it works here) of each public method of ``sgl.Engine``."""
    from sglang.srt.entrypoints import engine as sgl

    for name, method in inspect.getmembers(sgl.Engine, inspect.isroutine):
        if name.startswith("_"):
            continue
        is_asynchronous = inspect.iscoroutinefunction(method)
        if name in REFUSED:
            how = f"`NotSupported`: {REFUSED[name]}"
        elif name in REFUSED_ON_CPU:
            how = f"{_SYNC}; on a CPU `NotSupported`"
        elif name in _DIFFERENT:
            how = _DIFFERENT[name]
        elif name in ONE_BY_ONE:
            how = _QUEUED
        else:
            how = _ASYNC if is_asynchronous else _SYNC
        yield name, f"{'async ' if is_asynchronous else ''}{name}({_parameters(method)})", how


def _parameters(method: Any) -> str:
    names = [
        f"{'**' if it.kind is it.VAR_KEYWORD else '*' if it.kind is it.VAR_POSITIONAL else ''}{name}"
        for name, it in inspect.signature(method).parameters.items()
        if name not in ("self", "cls")
    ]
    return ", ".join(names if len(names) <= 6 else [*names[:5], "…"])


def markdown() -> str:
    """Return the table of docs/engines.md; a test compares the two."""
    found = list(methods())
    lines = ["| `sgl.Engine` | here | tested |", "|---|---|---|"]
    lines += [
        f"| `{signature}` | {how} | {LIMITS.get(name, 'yes')} |" for name, signature, how in found
    ]
    added = {name for name in {**vars(HasWeights), **vars(Engine)} if not name.startswith("_")}
    added -= {name for name, _, _ in found}
    lines += [f"| - | `{name}` | yes |" for name in sorted(added)]
    return "\n".join(lines)
