"""sglang.srt.eplb.expert_location: metadata belongs to the runner and may be set again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.distributed.keys import experts_key
from sglang_distguard.patching import Around
from sglang_distguard.sync.single_flight import run_once

MODULE = "sglang.srt.eplb.expert_location"
_FIELDS = ("num_layers", "num_physical_experts", "num_logical_experts", "ep_size")


def experts_spec(metadata: Any) -> dict[str, Any]:
    """Return what two settings of one scope must agree on: the numbers of layers and experts."""
    return {field: getattr(metadata, field, None) for field in _FIELDS}


def _set_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang asserts that metadata is set once per process (0.5.23: a bare AssertionError)."""
    namespace = original.__globals__

    @functools.wraps(original)
    def set_global_expert_location_metadata(value: Any, allow_overwrite: bool = False) -> None:
        if value is None or allow_overwrite:
            # A dense model, or SGLang replacing its own (rebalancing, elastic EP).
            original(value, allow_overwrite=True)
            return
        key = experts_key()
        _core.forget(key)  # left by a runner that is gone; does nothing while a runner holds it

        def observe() -> Optional[int]:
            current = namespace["get_global_expert_location_metadata"]()
            return None if current is None else id(current)

        def assign(_shared: Any = None) -> None:
            original(value, allow_overwrite=True)

        before = namespace["get_global_expert_location_metadata"]()
        requested = experts_spec(value)
        run_once(
            key,
            requested,
            observe=observe,
            initialise=assign,
            adopt=lambda: (assign(), requested),
            join=assign,
            undo=lambda: original(before, allow_overwrite=True),
        )

    return set_global_expert_location_metadata


CHANGES = (
    Around(
        MODULE,
        "set_global_expert_location_metadata",
        _set_metadata,
        uses=("get_global_expert_location_metadata",),
    ),
)
