"""torch.distributed: groups in use are not destroyed; in a turn, groups are created as agreed.

A group that a runner makes with other programs, such as a trainer (0.5.23:
`init_custom_process_group`), has a name of its own in torch's tables. Two runners may give theirs
the same name; torch (2.14.1) refuses the second. The keys in the store, by which the
programs meet, keep the name that was asked for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.distributed import coordinators
from sglang_distguard.distributed.ranks import creation
from sglang_distguard.distributed.teardown import keeps_adopted, tearing_down
from sglang_distguard.distributed.world import World
from sglang_distguard.patching import Around

MODULE = "torch.distributed.distributed_c10d"
#: Name in torch's tables of the group that is being made with other programs, if it differs.
_own_name: ContextVar[Optional[str]] = ContextVar("sglang_distguard.own_name", default=None)


def _destroy_process_group(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_process_group(group: Any = None) -> None:
        if group is not None and creation.is_lone(group) and not coordinators.is_known(group):
            return  # another of the coordinators that have it has destroyed it
        concerned = coordinators.keys_of(group)
        if any(keeps_adopted(key) for key in concerned):
            return  # 0.5.23: `cleanup_dist_env_and_memory` destroys again, adopted or not
        with tearing_down(*concerned) as states:
            original(group)
            for state in states:
                if isinstance(state.resource, World):
                    state.resource.restore_excepthook()

    return destroy_process_group


def _process_group_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_group_name(*args: Any, **kwargs: Any) -> Any:
        creating = creation.current()
        name = None if creating is None else creating.next_name()
        return original(*args, **kwargs) if name is None else name

    return process_group_name


def _new_process_group_helper(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def new_process_group_helper(*args: Any, **kwargs: Any) -> Any:
        creating = creation.current()
        call = signature.bind(*args, **kwargs).arguments
        # Empty for the default group, and for groups with other programs.
        members = call["global_ranks_in_group"]
        if creating is not None:
            # Not groups with other programs, such as a trainer: those do not come to the meeting.
            agreed = not members or creating.names(call["group_name"])
            size, is_member = call["group_size"], not members or _rank() in members
            if agreed and is_member and size > 1:
                creating.meet(call["group_name"], size, call["store"])
            if agreed and is_member and members and size == 1:
                key = _lone_key(call)
                if key is not None:
                    return creating.lone(key, lambda: original(*args, **kwargs))
        own = None if members else _name_of_runner(call["group_name"])
        if own is not None and own in coordinators.process_group_names():
            call["group_name"] = own  # torch refuses it
            return original(**call)
        token = _own_name.set(own)
        try:
            return original(*args, **kwargs)
        finally:
            _own_name.reset(token)

    return new_process_group_helper


def _lone_key(call: dict[str, Any]) -> Optional[Hashable]:
    """What two groups of one member must agree on to be one; None for a group of its own.

    A group that is bound to a device is split from the default group, in which every rank takes
    part (2.14.1).
    """
    own = ("backend_options", "device_id")
    if any(call.get(name) is not None for name in own):
        return None
    members, backend = call["global_ranks_in_group"], str(call["backend"])
    return (tuple(members), backend, call.get("timeout"), call.get("pg_tag"))


def _name_of_runner(name: str) -> Optional[str]:
    """The name in torch's tables of a group that a runner's method makes with other programs."""
    execution = _core.current_execution()
    if execution is None or execution.runner is None or _rank() < 0:
        return None
    scope = execution.scope
    return f"{name} of scope {0 if scope is None else scope.id}"


def _register_pg_in_world(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def register_pg_in_world(*args: Any, **kwargs: Any) -> None:
        own = _own_name.get()
        if own is None:
            original(*args, **kwargs)
            return
        call = signature.bind(*args, **kwargs).arguments
        call["group_name"] = own
        call["pg"]._set_group_name(own)
        original(**call)

    return register_pg_in_world


def _rank() -> int:
    group = coordinators.default_process_group()
    return -1 if group is None else group.rank()


def _rendezvous(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def rendezvous(*args: Any, **kwargs: Any) -> Any:
        creating = creation.current()
        if creating is not None:
            kwargs["timeout"] = creating.limit(kwargs.get("timeout"))
        return original(*args, **kwargs)

    return rendezvous


def _get_default_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the methods of a runner its own copy of torch's default group.

    SGLang runs some collectives over the default group. Code outside of a runner's methods uses the
    real group. `new_group` names its own store by this group, so in a turn it is the real group on
    every rank.
    """

    @functools.wraps(original)
    def get_default_group() -> Any:
        default = original()
        if _core.depth() == 0 or default.size() == 1 or creation.current() is not None:
            return default
        own = coordinators.own_default_group()
        return default if own is None else own

    return get_default_group


CHANGES = (
    Around(MODULE, "destroy_process_group", _destroy_process_group),
    Around(MODULE, "_process_group_name", _process_group_name),
    Around(MODULE, "_new_process_group_helper", _new_process_group_helper),
    Around(MODULE, "_register_pg_in_world", _register_pg_in_world),
    Around(MODULE, "_get_default_group", _get_default_group),
    Around("torch.distributed.rendezvous", "rendezvous", _rendezvous),
)
