"""sglang.srt.model_executor.forward_batch_info: an answer about one runner is not kept for all."""

from __future__ import annotations

from typing import Any

from sglang_distguard.patching import Replace

MODULE = "sglang.srt.model_executor.forward_batch_info"
_IMPORTS_IT = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"


def _uncached(function: Any) -> Any:
    return getattr(function, "__wrapped__", function)


# 0.5.23: `lru_cache` without arguments over `get_parallel()`; the second module has it by its import.
CHANGES = (
    Replace(MODULE, "_dp_tp_moe_masks_pad_rows", _uncached),
    Replace(_IMPORTS_IT, "_dp_tp_moe_masks_pad_rows", _uncached),
)
