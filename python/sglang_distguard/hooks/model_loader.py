"""sglang.srt.model_loader.utils: the default dtype of a load belongs to its execution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard.context.default_dtype import holding
from sglang_distguard.patching import Around


def _set_default_torch_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_default_torch_dtype(dtype: Any) -> Iterator[None]:
        with holding(dtype):
            yield

    return set_default_torch_dtype


CHANGES = (
    Around("sglang.srt.model_loader.utils", "set_default_torch_dtype", _set_default_torch_dtype),
)
