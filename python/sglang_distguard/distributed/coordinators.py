"""Read, stamp, compare and destroy SGLang's world and model-parallel groups.

Names are those of sglang 0.5.23 (`parallel_state` globals and `ParallelContext` fields). Functions
that read or set those globals raise NotSupported when SGLang is not patched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.context import generation
from sglang_distguard.context.accessors import accessor, find_accessor
from sglang_distguard.distributed import nccl
from sglang_distguard.distributed.destroyed_groups import PROCESS_GROUPS, DestroyedGroup
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

#: The global that every release has.
REQUIRED = "_TP"
#: A tag that no send uses.
_NO_TAG = 2**30 + 7
_OWN = "_sglang_distguard_own"

#: Flags of the configuration with which groups are made.
FLAGS = (
    "_ENABLE_CUSTOM_ALL_REDUCE",
    "_ENABLE_MSCCLPP",
    "_ENABLE_TORCH_SYMM_MEM_ALL_REDUCE",
    "_ENABLE_FLASHINFER_ALLREDUCE_ONLY",
)

#: True while a draft worker's groups temporarily replace the shared ones.
PATCHED = ("_TP_STATE_PATCHED", "_PP_STATE_PATCHED")

#: With several ranks, an additional key of ``Groups``: the world coordinator made with the groups.
OWN_WORLD = "own world"

Groups = dict[str, Any]


def _accessors(names: Iterable[str]) -> dict[str, _core.ScopedGlobal]:
    """Return the accessors of those globals in ``names`` that this release has.

    Raises:
        NotSupported: SGLang is not patched.
    """
    accessor(MODULE, REQUIRED)
    found = {name: find_accessor(MODULE, name) for name in names}
    return {name: it for name, it in found.items() if it is not None}


def flags() -> dict[str, Any]:
    """Return the values of ``FLAGS`` in the current scope, by the name of the setting."""
    return {name.strip("_").lower(): it.value for name, it in _accessors(FLAGS).items()}


def read() -> Groups:
    """Return module global -> GroupCoordinator (or None) in the current scope."""
    return read_in(_core.current_scope())


def find() -> Groups:
    """Return the live groups of the current scope, else those of SGLang's default scope.

    Groups that one runner owns are skipped, because no other runner may use them. All values are
    None when no groups are found.
    """
    for scope in (_core.current_scope(), None):
        found = read_in(scope)
        if identity(found) is not None and not _is_owned(found):
            return found
    return dict.fromkeys(FIELDS)


def read_in(scope: Optional[_core.Scope]) -> Groups:
    """Return module global -> GroupCoordinator (or None) in ``scope``."""
    made = {name: it.value_in(scope) for name, it in _accessors(FIELDS).items()}
    return {**dict.fromkeys(FIELDS), **made}


def _is_owned(found: Groups) -> bool:
    """Whether one runner owns the groups ``found``."""
    owned = (_core.resource(key) or {} for key in all_keys() if key != GROUPS)
    return any(found["_TP"] is groups["_TP"] for groups in owned if groups)


def write(groups: Groups) -> None:
    """Set the globals of the current scope to ``groups``."""
    for name, it in _accessors(FIELDS).items():
        it.value = groups[name]


def stamp(groups: Groups) -> None:
    """Stamp ``groups`` into the current scope, as if the scope had built them."""
    stamped = {
        field: groups[name]
        for name, field in FIELDS.items()
        if field is not None and groups[name] is not None
    }
    if OWN_WORLD in groups:
        stamped["world_group"] = groups[OWN_WORLD]
    generation.current().stamp(stamped)
    write(groups)


def widths(groups: Groups) -> dict[str, int]:
    """Return the actual widths of live ``groups``, by the name of the setting."""
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
    """Return a number that distinguishes ``groups`` from groups made later.

    None when they are destroyed or incomplete.
    """
    if groups["_TP"] is None or groups["_PP"] is None:
        return None
    coordinators = [groups[name] for name in FIELDS]
    if not all(group is None or is_alive(group) for group in coordinators):
        return None
    return hash(tuple(map(id, coordinators))) & (2**64 - 1)


def swapped(shared: Groups) -> Optional[Groups]:
    """Return groups that replaced ``shared`` in the default or current scope; None without any.

    A draft's own groups do not count: SGLang puts them there for a with block and sets a flag
    (0.5.23: `patch_tensor_parallel_group`, `patch_pipeline_parallel_group`).
    """
    for scope in {None: None, _core.current_scope(): None}:
        live = read_in(scope)
        patched = any(it.value_in(scope) for it in _accessors(PATCHED).values())
        if live["_TP"] is None or patched or _is_owned(live):
            continue
        if any(shared[name] is not None and live[name] is not shared[name] for name in FIELDS):
            return live
    return None


def unset() -> None:
    """Remove the groups from the current scope only, so that it may be given other widths.

    0.5.23: `publish` compares the new widths with the groups and ranks that are stamped.
    """
    write(dict.fromkeys(FIELDS))
    generation.current().clear_stamps()


def destroy_and_unset(groups: Groups) -> None:
    """Destroy the coordinators in ``groups`` and unset the current scope's globals.

    One coordinator backs several globals when widths agree (0.5.23: `_ATTN_TP is _TP`). That is
    harmless, because ``GroupCoordinator.destroy`` may be called again.
    """
    write(dict.fromkeys(FIELDS))
    destroy(groups)


def destroy(groups: Groups) -> None:
    """Destroy the coordinators in ``groups``, even if other objects refer to them."""
    for coordinator in groups.values():
        if coordinator is not None:
            coordinator.destroy()  # hooks.parallel_state: it refuses collectives from now on


def disconnect(groups: Groups) -> None:
    """Close the connections of the coordinators in ``groups``, even if other objects refer to them.

    Destroying a process group closes nothing while a model's layers refer to it (0.5.23: the logits
    processor does). gloo closes every connection of a group when a receive times out (torch
    2.14.1). Other ranks that wait for this rank then get an error. Groups of other backends are
    aborted.
    """
    import torch

    for coordinator in groups.values():
        if coordinator is not None:
            nccl.destroy_soon(coordinator, abort=True)
    for group in {part for it in groups.values() if it is not None for part in parts(it)}:
        if group.name() != "gloo":
            with suppress(RuntimeError):
                group.abort()
            continue
        for other in range(group.size()):
            # For a rank that has ended it fails at once and closes nothing.
            with suppress(RuntimeError):
                if other != group.rank():
                    group.recv([torch.zeros(1)], other, _NO_TAG).wait(timedelta(milliseconds=1))


def on_their_device(groups: Groups) -> AbstractContextManager[object]:
    """Make the device of the coordinators in ``groups`` current, if it is a CUDA device.

    A thread that no runner's code has used has device 0, on which CUDA would make a context.
    """
    import torch

    device = getattr(groups["_TP"], "device", None)
    return nullcontext() if device is None or device.type != "cuda" else torch.cuda.device(device)


def forget_dead_names() -> None:
    """Remove SGLang's entries of coordinators that were garbage-collected.

    0.5.23: `_groups` has a weak reference to every coordinator ever made, by name. It removes none.
    """
    known = vars(sys.modules[MODULE]).get("_groups", {})
    for name in [name for name, coordinator in list(known.items()) if coordinator() is None]:
        known.pop(name, None)


def process_groups() -> list[Any]:
    """Return torch's process groups that SGLang made (it names them "tp:device", "pp:cpu" …)."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    return [
        group
        for group in list(c10d._world.pg_map)
        if str(getattr(group, "group_desc", "")).endswith((":device", ":cpu"))
    ]


def process_group_names() -> list[str]:
    """Return the names of all of torch's process groups."""
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    return list(c10d._world.pg_names.values())


def destroy_process_groups(keep: list[Any], prefix: str = "") -> None:
    """Destroy the process groups that a failed build has made since ``keep`` was read.

    A GroupCoordinator that fails between its two `new_group` calls leaves the first group without
    an owner.

    Args:
        keep: the process groups that existed before (``process_groups``).
        prefix: only groups whose names begin with it are destroyed, because another runner's
            groups may have been made in between.
    """
    c10d = sys.modules["torch.distributed.distributed_c10d"]
    kept = {id(group) for group in keep}
    for group in process_groups():
        if id(group) not in kept and str(c10d._world.pg_names.get(group, "")).startswith(prefix):
            c10d.destroy_process_group(group)


def default_process_group() -> Optional[Any]:
    """Return torch's default process group; None before it is initialised."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def world_identity() -> Optional[int]:
    """Return the identity of torch's default process group; None without one."""
    group = default_process_group()
    return None if group is None else id(group)


def shared_identity() -> Optional[int]:
    """Return the identity of the shared groups, or of groups made without the guard."""
    shared = _core.resource(GROUPS)
    if shared is None:
        return identity(find())
    return identity(swapped(shared) or shared)


def own_identity() -> Optional[int]:
    """Return the identity of the groups that the current scope owns; None without any."""
    return identity(read())


def own_default_group() -> Optional[Any]:
    """Return the group that the running runner uses as torch's default process group.

    It belongs to the world coordinator that was made with the runner's groups. None outside of
    runners' methods.
    """
    coordinator = generation.current().stamped("world_group")
    if coordinator is None or not getattr(coordinator, _OWN, False):
        return None
    return coordinator.device_group


def mark_own(coordinator: Any) -> Any:
    """Mark a world coordinator as made together with a runner's groups, and return it."""
    setattr(coordinator, _OWN, True)
    return coordinator


def identities() -> dict[str, Optional[int]]:
    """Return the identities of the live world and groups, by registry key.

    They are read from torch and SGLang, not from the registry.
    """
    try:
        groups = identity(find())
    except NotSupported:  # SGLang is not patched, so its groups cannot be read
        groups = None
    return {WORLD: world_identity(), GROUPS: groups}


def parts(coordinator: Any) -> list[Any]:
    """Return torch's process groups behind a GroupCoordinator; none after ``destroy``."""
    made = [getattr(coordinator, name, None) for name in PROCESS_GROUPS]
    return [it for it in made if it is not None and not isinstance(it, DestroyedGroup)]


def is_alive(coordinator: Any) -> bool:
    """Whether torch still lists the coordinator's groups; `destroy_process_group` removes them."""
    made = parts(coordinator)
    return len(made) == 2 and all(map(is_known, made))


def is_known(process_group: Any) -> bool:
    """Whether torch lists ``process_group``, which it does until the group is destroyed."""
    return process_group in sys.modules["torch.distributed.distributed_c10d"]._world.pg_map


def keys_of(group: Any) -> tuple[str, ...]:
    """Return the registry keys of all state that is destroyed with ``group``.

    torch destroys every group with the default one (2.14.1).
    """
    if group is None or group is default_process_group():
        return (*all_keys(), WORLD)
    world = _core.resource(WORLD)
    if world is not None and any(group is part for part in parts(world.coordinator)):
        return (WORLD,)
    for key in all_keys():
        made = (_core.resource(key) or {}).values()
        if any(group is part for coordinator in made for part in parts(coordinator)):
            return (key,)
    return ()
