"""sglang.srt.environ: writes of a runner or configuration through ``envs`` stay in its scope."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Optional

from sglang_distguard.context import environment
from sglang_distguard.patching import Around

MODULE = "sglang.srt.environ"


def _write(field: Any, written: Optional[environment.Written]) -> None:
    if written is not None:
        environment.ask_scopes_first(field)
    environment.write(field.name, written)


def _set(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set(self: Any, value: Any) -> None:
        if environment.is_own():
            _write(self, (str(value), value is None))
            return
        _write(self, None)  # the last write counts
        original(self, value)

    return set


def _clear(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def clear(self: Any) -> None:
        if environment.is_own():
            _write(self, (None, False))
            return
        _write(self, None)
        original(self)

    return clear


def _override(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def override(self: Any, value: Any) -> Iterator[None]:
        before = environment.find(self.name)
        if not environment.is_own():
            _write(self, None)
            try:
                yield from original(self, value)
            finally:
                _write(self, before)
            return
        _write(self, (str(value), value is None))
        try:
            yield
        finally:
            _write(self, before)

    return override


#: A field that a scope has written reads through these (``context.environment``).
_USED = tuple(f"EnvField.{name}" for name in ("parse", "_resolve_default", "get", "is_set"))
CHANGES = (
    Around(MODULE, "EnvField.set", _set, _USED),
    Around(MODULE, "EnvField.clear", _clear, _USED),
    Around(MODULE, "EnvField.override", _override, _USED),
)
