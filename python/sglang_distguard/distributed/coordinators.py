"""SGLang's world and model-parallel groups as values: read, stamped into a scope, checked, undone.

Names are those of sglang 0.5.23 (`parallel_state` globals and `ParallelContext` fields).
"""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context.scopes import accessor
from sglang_distguard.distributed.keys import GROUPS, WORLD, all_keys
from sglang_distguard.errors import NotSupported

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

#: A tag under which nobody sends.
_NO_TAG = 2**30 + 7
_OWN = "_sglang_distguard_own"

#: Flags of a configuration with which groups are made.
FLAGS = (
    "_ENABLE_CUSTOM_ALL_REDUCE",
    "_ENABLE_MSCCLPP",
    "_ENABLE_TORCH_SYMM_MEM_ALL_REDUCE",
    "_ENABLE_FLASHINFER_ALLREDUCE_ONLY",
)

#: True while a draft worker's groups stand in for the shared ones.
PATCHED = ("_TP_STATE_PATCHED", "_PP_STATE_PATCHED")

#: In the groups of several ranks, beside the globals above: a coordinator of the world with them.
OWN_WORLD = "own world"

Groups = dict[str, Any]


def read() -> Groups:
    """Global -> GroupCoordinator (or None) in the current scope."""
    return {name: accessor(MODULE, name).value for name in FIELDS}


def find() -> Groups:
    """The groups of the current scope or, when it has none that live, of SGLang's default one.

    Not those that one runner owns: they are nobody else's.
    """
    for scope in (_core.current_scope(), None):
        found = read_in(scope)
        if identity(found) is not None and not _is_owned(found):
            return found
    return dict.fromkeys(FIELDS)


def read_in(scope: Optional[_core.Scope]) -> Groups:
    """Global -> GroupCoordinator (or None) in ``scope``."""
    return {name: accessor(MODULE, name).value_in(scope) for name in FIELDS}


def _is_owned(found: Groups) -> bool:
    """Whether one runner owns these."""
    owned = (_core.resource(key) or {} for key in all_keys() if key != GROUPS)
    return any(found["_TP"] is groups["_TP"] for groups in owned if groups)


def write(groups: Groups) -> None:
    """Set the globals of the current scope."""
    for name in FIELDS:
        accessor(MODULE, name).value = groups[name]


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
    if OWN_WORLD in groups:
        parallel.override_permanently(world_group=groups[OWN_WORLD])
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
    if groups["_TP"] is None or groups["_PP"] is None:
        return None
    coordinators = [groups[name] for name in FIELDS]
    if not all(group is None or is_alive(group) for group in coordinators):
        return None
    return hash(tuple(map(id, coordinators))) & (2**64 - 1)


def swapped(shared: Groups) -> Optional[Groups]:
    """The groups of the default or the current scope if somebody put others there than ``shared``.

    Not so a draft's own, which SGLang puts there for a with block and says so
    (0.5.23: `patch_tensor_parallel_group`, `patch_pipeline_parallel_group`).
    """
    for scope in {None: None, _core.current_scope(): None}:
        live = read_in(scope)
        patched = any(accessor(MODULE, name).value_in(scope) for name in PATCHED)
        if live["_TP"] is None or patched or _is_owned(live):
            continue
        if any(shared[name] is not None and live[name] is not shared[name] for name in FIELDS):
            return live
    return None


def unset() -> None:
    """The current scope has no groups any more, those of others stay: it may be given other widths.

    0.5.23: `publish` compares the new widths with the groups and ranks that are stamped.
    """
    write(dict.fromkeys(FIELDS))
    accessor("sglang.srt.runtime_context", "_PARALLEL").value.clear_stamp()


def destroy_and_unset(groups: Groups) -> None:
    """Destroy the coordinators in ``groups`` and unset the current scope's globals.

    One coordinator backs several globals when widths agree (0.5.23: `_ATTN_TP is _TP`);
    ``GroupCoordinator.destroy`` may be called again.
    """
    write(dict.fromkeys(FIELDS))
    destroy(groups)


def destroy(groups: Groups) -> None:
    """Destroy the coordinators in ``groups``, whoever refers to them."""
    for coordinator in groups.values():
        if coordinator is not None:
            coordinator.destroy()


def sever(groups: Groups) -> None:
    """Close the connections of the coordinators in ``groups``, whoever refers to them.

    Destroying a process group closes nothing while a model's layers refer to it (0.5.23: the logits
    processor does). gloo closes every connection of a group when a receive times out (torch 2.14.1),
    and then whoever waits for this rank on another gets an error. Other backends abort.
    """
    import torch

    for group in {part for it in groups.values() if it is not None for part in parts(it)}:
        if group.name() != "gloo":
            with suppress(RuntimeError):
                group.abort()
            continue
        for other in range(group.size()):  # one that is gone fails at once, and closes nothing
            with suppress(RuntimeError):
                if other != group.rank():
                    group.recv([torch.zeros(1)], other, _NO_TAG).wait(timedelta(milliseconds=1))


def forget_dead_names() -> None:
    """Drop what SGLang keeps of coordinators that are gone.

    0.5.23: `_groups` has a weak reference to each one ever made, by name, and loses none.
    """
    known = vars(sys.modules[MODULE]).get("_groups", {})
    for name in [name for name, coordinator in list(known.items()) if coordinator() is None]:
        known.pop(name, None)


def process_groups() -> list[Any]:
    """The process groups that torch knows and SGLang made (it names them "tp:device", "pp:cpu" …)."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    return [
        group
        for group in list(c10d._world.pg_map)
        if str(getattr(group, "group_desc", "")).endswith((":device", ":cpu"))
    ]


def destroy_process_groups(keep: list[Any], prefix: str = "") -> None:
    """Destroy what SGLang made since ``keep`` was read and no coordinator owns any more.

    A GroupCoordinator that fails between its two `new_group` calls leaves the first behind.

    Args:
        keep: what was there before.
        prefix: begins the names of what is meant: another runner's may have come in between.
    """
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    kept = {id(group) for group in keep}
    for group in process_groups():
        if id(group) not in kept and str(c10d._world.pg_names.get(group, "")).startswith(prefix):
            c10d.destroy_process_group(group)


def default_process_group() -> Optional[Any]:
    """torch's default process group, None before it is initialised."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def world_identity() -> Optional[int]:
    """Identity of torch's default process group."""
    group = default_process_group()
    return None if group is None else id(group)


def shared_identity() -> Optional[int]:
    """Identity of the groups that the process shares, or that somebody made without the guard."""
    shared = _core.resource(GROUPS)
    if shared is None:
        return identity(find())
    return identity(swapped(shared) or shared)


def own_identity() -> Optional[int]:
    """Identity of the groups that the current scope owns."""
    return identity(read())


def own_default_group() -> Optional[Any]:
    """What torch's default process group is to the runner whose method runs: its own world's.

    None outside of runners' methods.
    """
    parallel = accessor("sglang.srt.runtime_context", "_PARALLEL").value
    coordinator = parallel._stamp.get("world_group")
    return coordinator.device_group if getattr(coordinator, _OWN, False) else None


def mark_own(coordinator: Any) -> Any:
    """Mark a coordinator of the world as made with runners' groups; returns it."""
    setattr(coordinator, _OWN, True)
    return coordinator


def identities() -> dict[str, Optional[int]]:
    """What is really there, by registry key, whatever the registry says."""
    try:
        groups = identity(find())
    except NotSupported:  # SGLang is not patched: nothing of it is ours to know
        groups = None
    return {WORLD: world_identity(), GROUPS: groups}


def parts(coordinator: Any) -> list[Any]:
    """torch's process groups behind a GroupCoordinator; none after ``destroy``."""
    both = (getattr(coordinator, "device_group", None), getattr(coordinator, "cpu_group", None))
    return [group for group in both if group is not None]


def is_alive(coordinator: Any) -> bool:
    """Whether torch still knows the coordinator's groups: `destroy_process_group` forgets them."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    known = c10d._world.pg_map
    made = parts(coordinator)
    return len(made) == 2 and all(group in known for group in made)
