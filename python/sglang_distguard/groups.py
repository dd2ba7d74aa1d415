"""SGLang's world and model-parallel groups as values: read, stamped into a scope, checked, undone.

Names are those of sglang 0.5.23 (`parallel_state` globals and `ParallelContext` fields).
"""

from __future__ import annotations

import sys
from typing import Any, Optional

from sglang_distguard.scoping import accessor

MODULE = "sglang.srt.distributed.parallel_state"

#: Module global -> ParallelContext field, as `initialize_model_parallel` (0.5.23) stamps them.
FIELDS: dict[str, Optional[str]] = {
    "_TP": "tp_group",
    "_PP": "pp_group",
    "_MOE_EP": "moe_ep_group",
    "_MOE_DP": "moe_dp_group",
    "_MOE_TP": "moe_tp_group",
    "_ATTN_TP": "attn_tp_group",
    "_ATTN_CP": "attn_cp_group",
    "_SHARED_EXPERTS_TP": "shared_experts_tp_group",
    "_DCP": "dcp_group",
    "_SELF_PP": None,
    "_PDMUX_PREFILL_TP_GROUP": None,
}

Groups = dict[str, Any]


def read() -> Groups:
    """Global -> GroupCoordinator (or None) in the current scope."""
    return {name: accessor(MODULE, name).value for name in FIELDS}


def find() -> Groups:
    """The groups of the current scope or, when it has none that live, of SGLang's default one."""
    own = read()
    if identity(own) is not None:
        return own
    return {name: accessor(MODULE, name).value_in(None) for name in FIELDS}


def write(groups: Groups) -> None:
    """Set the globals of the current scope."""
    for name, group in groups.items():
        accessor(MODULE, name).value = group


def stamp(groups: Groups) -> None:
    """Give the current scope ``groups``, as if it had built them itself."""
    parallel = accessor("sglang.srt.runtime_context", "_PARALLEL").value
    parallel.override_permanently(
        **{
            field: groups[name]
            for name, field in FIELDS.items()
            if field is not None and groups[name] is not None
        }
    )
    write(groups)


def widths(groups: Groups) -> dict[str, int]:
    """The widths that live groups really have, by the name of the setting."""
    sizes = {
        "tp_size": "_TP",
        "pp_size": "_PP",
        "attn_tp_size": "_ATTN_TP",
        "moe_ep_size": "_MOE_EP",
    }
    return {
        size: groups[name].world_size for size, name in sizes.items() if groups[name] is not None
    }


def identity(groups: Groups) -> Optional[int]:
    """What tells these groups from others made later; None when they are gone or incomplete."""
    tp, pp = groups["_TP"], groups["_PP"]
    if tp is None or pp is None or not (_is_alive(tp) and _is_alive(pp)):
        return None
    return id(tp)


def discard(groups: Groups) -> None:
    """Destroy the coordinators in ``groups`` and unset the current scope's globals.

    One coordinator backs several globals when widths agree (0.5.23: `_ATTN_TP is _TP`);
    ``GroupCoordinator.destroy`` may be called again.
    """
    write(dict.fromkeys(FIELDS))
    for coordinator in groups.values():
        if coordinator is not None:
            coordinator.destroy()


def process_groups() -> list[Any]:
    """The process groups that torch knows and SGLang made (it names them "tp:device", "pp:cpu" …)."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    return [
        group
        for group in list(c10d._world.pg_map)
        if str(getattr(group, "group_desc", "")).endswith((":device", ":cpu"))
    ]


def discard_process_groups(keep: list[Any]) -> None:
    """Destroy what SGLang made since ``keep`` was read and no coordinator owns any more.

    A GroupCoordinator that fails between its two `new_group` calls leaves the first behind.
    """
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    kept = {id(group) for group in keep}
    for group in process_groups():
        if id(group) not in kept:
            c10d.destroy_process_group(group)


def default_process_group() -> Optional[Any]:
    """torch's default process group, None before it is initialised."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def _is_alive(coordinator: Any) -> bool:
    """Whether torch still knows the coordinator's groups: `destroy_process_group` forgets them."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    known = c10d._world.pg_map
    return all(
        group is not None and group in known
        for group in (
            getattr(coordinator, "device_group", None),
            getattr(coordinator, "cpu_group", None),
        )
    )
