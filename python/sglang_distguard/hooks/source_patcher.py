"""SGLang's source patcher (debug_utils, 0.5.23) compiles an edited copy of a function's text into the function.

Of a function that the guard has changed the copy would be plain SGLang's: it would run in no step of its
runner, or read another runner's globals. Such an edit is refused; all others are SGLang's own business.
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
        if is_changed(target.__code__):
            _refuse(
                target, "is one that the guard changes, and the edited copy would not be changed"
            )
        before = target.__code__
        state = original(target=target, **edits)
        read = unscoped_reads(target)
        if read:
            target.__code__ = before
            _refuse(target, f"would then use {', '.join(read)}, of which each runner has its own")
        return state

    return patch_function


def _refuse(target: Any, why: str) -> None:
    name = f"{target.__module__}.{target.__qualname__}"
    raise NotSupported(
        f"SGLang's source patcher cannot edit {name} while the guard is installed: it {why}. It is as "
        "it was. Edit a function that it calls or that calls it, or, with one runner in the process, "
        "edit after sglang_distguard.uninstall()",
        requested=name,
    )


CHANGES = (Around(MODULE, "patch_function", _patch_function),)
