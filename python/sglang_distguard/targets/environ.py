"""sglang.srt.environ: what a runner or its configuration writes through ``envs`` is its scope's."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard import environment
from sglang_distguard.patching import Around, Needs

MODULE = "sglang.srt.environ"


def _get(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get(self: Any) -> Any:
        written = environment.find(self.name)
        if written is None:
            return original(self)
        text, is_none = written
        if is_none:
            return None
        if text is None:
            return self._resolve_default()
        try:
            return self.parse(text)
        except ValueError as error:  # as the original does with the process's variable
            default = self._resolve_default()
            warnings.warn(
                f'Invalid value for {self.name}: {error}, using default "{default}"', stacklevel=2
            )
            return default

    return get


def _is_set(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def is_set(self: Any) -> bool:
        written = environment.find(self.name)
        return bool(original(self)) if written is None else written[0] is not None

    return is_set


def _set(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set(self: Any, value: Any) -> None:
        if environment.is_own():
            environment.write(self.name, (str(value), value is None))
            return
        environment.write(self.name, None)  # what is written last counts
        original(self, value)

    return set


def _clear(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def clear(self: Any) -> None:
        if environment.is_own():
            environment.write(self.name, (None, False))
            return
        environment.write(self.name, None)
        original(self)

    return clear


def _override(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def override(self: Any, value: Any) -> Iterator[None]:
        before = environment.find(self.name)
        if not environment.is_own():
            environment.write(self.name, None)
            try:
                yield from original(self, value)
            finally:
                environment.write(self.name, before)
            return
        environment.write(self.name, (str(value), value is None))
        try:
            yield
        finally:
            environment.write(self.name, before)

    return override


CHANGES = (
    Needs(MODULE, "EnvField.parse"),
    Needs(MODULE, "EnvField._resolve_default"),
    Around(MODULE, "EnvField.get", _get),
    Around(MODULE, "EnvField.is_set", _is_set),
    Around(MODULE, "EnvField.set", _set),
    Around(MODULE, "EnvField.clear", _clear),
    Around(MODULE, "EnvField.override", _override),
)
