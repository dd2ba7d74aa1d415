"""Functions of SGLang that an engine's start calls again and again: it pauses there.

Other hooks in which a start pauses: the configuration of a model, free memory, sockets, weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard.patching import Around
from sglang_distguard.sync.pacing import pause


def _pausing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pausing(*args: Any, **kwargs: Any) -> Any:
        pause()
        return original(*args, **kwargs)

    return pausing


CHANGES = (
    # Each step of resolving `ServerArgs`, and each linear layer of a model (0.5.23).
    Around("sglang.srt.arg_groups.resolution_hooks", "run_hook", _pausing),
    Around("sglang.srt.layers.linear", "LinearBase.__init__", _pausing),
)
