"""torch: a default dtype that is set in a runner's methods belongs to the running execution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.context import default_dtype
from sglang_distguard.patching import Around, Replace


def _set_default_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """Model code may call torch itself (0.5.23: transformers' `local_torch_dtype`)."""

    @functools.wraps(original)
    def set_default_dtype(d: Any) -> None:
        if _core.depth() == 0:
            original(d)
        else:
            default_dtype.set_in_force(d)

    return set_default_dtype


def _get_default_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_default_dtype() -> Any:
        # Under torch.compile, Dynamo knows only the builtin. Loads are never compiled.
        if default_dtype.is_traced():
            return original()
        return default_dtype.in_force() or original()

    return get_default_dtype


CHANGES = (
    Around("torch", "set_default_dtype", _set_default_dtype),
    Replace("torch", "get_default_dtype", _get_default_dtype),
)
