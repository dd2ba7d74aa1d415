"""How each public method of the installed ``sgl.Engine`` works in ``Engine``: the table of the docs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from sglang_distguard.engines.engine import ONE_BY_ONE, REFUSED, Engine

_DIFFERENT = {
    "generate": "requests of any number of threads at a time",
    "async_generate": "from any asyncio loop; cancelling the caller aborts the request",
    "shutdown": "as `close()`; ends this engine alone",
}
_SYNC = "from any thread, any number at a time"
_ASYNC = "from any asyncio loop"
_QUEUED = "from any thread; one call after another"
#: What ``tests/test_engines.py`` calls.
TESTED = frozenset(
    [
        *("generate", "async_generate", "shutdown", "flush_cache", "get_model_info"),
        *("get_server_info", "freeze_gc", "update_weights_from_disk", "get_weights_by_name"),
    ]
)


def methods() -> Iterator[tuple[str, str, str]]:
    """Yield (name, signature, how it works here) of each public method of ``sgl.Engine``."""
    from sglang.srt.entrypoints import engine as sgl

    for name, method in inspect.getmembers(sgl.Engine, inspect.isroutine):
        if name.startswith("_"):
            continue
        is_asynchronous = inspect.iscoroutinefunction(method)
        if name in REFUSED:
            how = f"`NotSupported`: {REFUSED[name]}"
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
        f"| `{signature}` | {how} | {'yes' if name in TESTED else '-'} |"
        for name, signature, how in found
    ]
    added = {name for name in vars(Engine) if not name.startswith("_")}
    added -= {name for name, _, _ in found}
    lines += [f"| - | `{name}` | yes |" for name in sorted(added)]
    return "\n".join(lines)
