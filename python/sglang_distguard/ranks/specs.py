"""What all ranks must ask for alike before anything is created for a runner, and its name if it has none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sglang_distguard import settings
from sglang_distguard.naming import name_of_path

#: Fields of ServerArgs (0.5.23) that decide which model is built and which collectives it runs. Not the
#: addresses, the devices and the seed, which may differ; widths come from the ParallelContext.
_FIELDS = (
    "model_path",
    "revision",
    "load_format",
    "dtype",
    "quantization",
    "device",
    "attention_backend",
    "sampling_backend",
    "kv_cache_dtype",
    "context_length",
    "page_size",
    "max_total_tokens",
    "max_running_requests",
    "chunked_prefill_size",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "enable_dp_attention",
    "disable_cuda_graph",
    "disable_custom_all_reduce",
    "moe_a2a_backend",
)


def model_spec(server_args: Any) -> dict[str, Any]:
    """The fields of published ``server_args`` that all ranks must share, as JSON values."""
    return {name: _plain(getattr(server_args, name, None)) for name in _FIELDS}


def plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` with JSON values only."""
    return {name: _plain(value) for name, value in spec.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def name_for(spec: Mapping[str, Any]) -> str:
    """The name in force, else one derived from what is asked for: the same on ranks that ask alike."""
    chosen = settings.current().name
    if chosen is not None:
        return chosen
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    return f"{name_of_path(str(spec['model_path']))}-{digest[:8]}"
