"""SGLang's source patcher (debug_utils, 0.5.23) may not edit functions that the guard changes.

The patcher compiles an edited copy of a function's text into the function. If the guard has changed
the function, the copy would be plain SGLang code. It would run in no step of its runner, or read
another runner's globals. Such an edit is refused. All other edits are left to SGLang.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.errors import NotSupported
from sglang_distguard.patching import Around, is_changed, unscoped_reads

MODULE = "sglang.srt.debug_utils.source_patcher.code_patcher"


def _patch_function(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patch_function(*, target: Any, **edits: Any) -> Any:
        if is_changed(target.__code__) or unscoped_reads(target):
            _refuse(
                target, "the guard changes this function, and the edited copy would lack the change"
            )
        before = target.__code__
        state = original(target=target, **edits)
        read = unscoped_reads(target)
        if read:
            target.__code__ = before
            _refuse(
                target,
                f"the edit would use {', '.join(read)}, of which each runner has its own value",
            )
        return state

    return patch_function


def _refuse(target: Any, why: str) -> None:
    name = f"{target.__module__}.{target.__qualname__}"
    raise NotSupported(
        f"SGLang's source patcher cannot edit {name} while the guard is installed: {why}. "
        "The function was left unchanged. Edit a function that it calls, or one that calls it. "
        "With one runner in the process, you can also edit after sglang_distguard.uninstall()",
        requested=name,
    )


CHANGES = (Around(MODULE, "patch_function", _patch_function),)
