"""sglang.srt.server_args: settings that are resolved before they are published write nothing here.

Resolving writes decisions of one configuration into environment variables (0.5.23: some always, such
as SGLANG_ENABLE_DETERMINISTIC_INFERENCE). `publish` gives them to the scope where it publishes. Code
that resolves before it publishes, as SGLang's own launch of an engine does, would give them to the
process, and so to every runner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang_distguard.config.host import is_host
from sglang_distguard.context import environment
from sglang_distguard.patching import Around, Within

#: Whether the running code starts child processes, which inherit what the process's variables say:
#: the guard may not be installed there.
_starts_children: ContextVar[bool] = ContextVar("sglang_distguard.starts_children", default=False)


@contextmanager
def _starting_children(_engine: Any) -> Iterator[None]:
    token = _starts_children.set(True)
    try:
        yield
    finally:
        _starts_children.reset(token)


def _resolve_once(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resolve_once(self: Any) -> None:
        if environment.is_own() or _starts_children.get() or not is_host():
            original(self)
        else:
            environment.resolve_apart(functools.partial(original, self), self)

    return resolve_once


CHANGES = (
    Around("sglang.srt.server_args", "ServerArgs.resolve_once", _resolve_once),
    Within("sglang.srt.entrypoints.engine", "Engine._launch_subprocesses", _starting_children),
)
