"""torch.distributed: a process group is not destroyed while runners compute through it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core, groups
from sglang_distguard.groups import GROUPS, WORLD
from sglang_distguard.patching import Around
from sglang_distguard.teardowns import lets_go, tearing_down
from sglang_distguard.world import World

MODULE = "torch.distributed.distributed_c10d"


def _concerned(group: Any) -> tuple[str, ...]:
    """What goes with ``group``: torch destroys every group with the default one (2.14.1)."""
    if group is None or group is groups.default_process_group():
        return (GROUPS, WORLD)
    world = _core.resource(WORLD)
    if world is not None and any(group is part for part in groups.parts(world.coordinator)):
        return (WORLD,)
    shared = _core.resource(GROUPS) or {}
    parts = [part for coordinator in shared.values() for part in groups.parts(coordinator)]
    return (GROUPS,) if any(group is part for part in parts) else ()


def _destroy_process_group(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_process_group(group: Any = None) -> None:
        concerned = _concerned(group)
        if any(lets_go(key) for key in concerned):
            return  # 0.5.23: `cleanup_dist_env_and_memory` destroys once more, whoever made it
        with tearing_down(*concerned) as states:
            original(group)
            for state in states:
                if isinstance(state.resource, World):
                    state.resource.restore_excepthook()

    return destroy_process_group


CHANGES = (Around(MODULE, "destroy_process_group", _destroy_process_group),)
