"""The values that must be equal on all ranks before a runner is created, and its default name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from sglang_distguard.config import settings
from sglang_distguard.config.naming import name_of_path

#: Fields of ServerArgs (0.5.23) that may differ between ranks: addresses, devices, folders, logs,
#: metrics, and the seed of sampling. All others decide the model or which collectives it runs.
_OWN = re.compile(
    r"(^|_)(ports?|addr|host|endpoints?|socket|dir|folder|ib_device|urls|metrics)$"
    r"|^(log_|ssl_|export_metrics|enable_metrics|otlp_|decoupled_spec_(rank|bind|connect))"
    r"|^(node_rank|base_gpu_id|gpu_id_step|numa_node|random_seed|mem_fraction_static|api_key"
    r"|admin_api_key|custom_sigquit_handler|stat_loggers|served_model_name|forward_pass_metrics_.*"
    r"|load_publish_endpoint|watermark_key(_b)?|remote_instance_weight_loader_seed_.*)$"
)
#: 0.5.23: a collective depends on whether this is set, not on its value (docs/COLLECTIVES.md).
_PRESENCE = "gated_launch_port"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
#: Texts with more characters are cut there and get a digest.
_LONG = 200


def model_spec(server_args: Any) -> dict[str, Any]:
    """Return the fields of ``server_args`` that must be equal on all ranks, as JSON values.

    Fields that are None are left out.
    """
    from sglang.srt.arg_groups.arg_utils import field_names

    names = [name for name in sorted(field_names(type(server_args))) if not _OWN.search(name)]
    found = {name: getattr(server_args, name, None) for name in names}
    if getattr(server_args, _PRESENCE, None) is not None:
        found[_PRESENCE] = "set"
    return plain({name: value for name, value in found.items() if value is not None})


def plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``spec`` with JSON values only."""
    return {name: _plain(value) for name, value in spec.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(value.items(), key=str)}
    text = _ADDRESS.sub("", str(value))
    if len(text) <= _LONG:
        return text
    return f"{text[:_LONG]}… ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def name_for(spec: Mapping[str, Any]) -> str:
    """Return the name in force, else one derived from ``spec``: equal where the specs are equal."""
    chosen = settings.current().name
    if chosen is not None:
        return chosen
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    return f"{name_of_path(str(spec['model_path']))}-{digest[:8]}"
