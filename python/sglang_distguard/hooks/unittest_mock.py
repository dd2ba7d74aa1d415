"""unittest.mock: a patch of a scoped global restores the value of the running code's scope."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.patching import Around
from sglang_distguard.patching.module_attributes import WithScopedAttributes


def _get_original(original: Callable[..., Any]) -> Callable[..., Any]:
    """Find the value to restore in the current scope.

    The original looks into the module's namespace (CPython 3.11 to 3.13), which has the values of
    the default scope.
    """

    @functools.wraps(original)
    def get_original(self: Any) -> Any:
        found, is_local = original(self)
        module = self.getter()
        if isinstance(module, WithScopedAttributes) and self.attribute in vars(type(module)):
            return getattr(module, self.attribute), True
        return found, is_local

    return get_original


CHANGES = (Around("unittest.mock", "_patch.get_original", _get_original),)
