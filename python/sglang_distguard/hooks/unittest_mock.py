"""unittest.mock: what a patch of a scoped global puts back is what was there in the running code's scope."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.patching import Around
from sglang_distguard.patching.module_attributes import WithScopedAttributes


def _get_original(original: Callable[..., Any]) -> Callable[..., Any]:
    """It looks into the module's namespace (CPython 3.11 to 3.13), which is the default scope's."""

    @functools.wraps(original)
    def get_original(self: Any) -> Any:
        found, is_local = original(self)
        module = self.getter()
        if isinstance(module, WithScopedAttributes) and self.attribute in vars(type(module)):
            return getattr(module, self.attribute), True
        return found, is_local

    return get_original


CHANGES = (Around("unittest.mock", "_patch.get_original", _get_original),)
