"""torch's default process group as its leader leaves it, and what has to be undone with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.distributed.coordinators import default_process_group
from sglang_distguard.distributed.keys import WORLD
from sglang_distguard.distributed.ranks.log import Ranks, open_ranks


@dataclass(frozen=True)
class World:
    """One world.

    Attributes:
        coordinator: SGLang's `_WORLD`; None when nobody has asked SGLang for one yet.
        ranks: who has to agree in it; None for one rank.
        process_group: kept, so that no other object gets its ``id`` while it counts as the world.
        excepthook: what ``sys.excepthook`` was before torch put its own on top, and torch's.
    """

    coordinator: Any
    ranks: Optional[Ranks]
    process_group: Any
    excepthook: Optional[tuple[Any, Any]] = None

    def restore_excepthook(self) -> None:
        """Take torch's excepthook out again, unless somebody put another on top.

        torch 2.14.1 chains one to the last at every ``init_process_group`` and never takes it out:
        each world would stay in memory, and prefix tracebacks once more with its rank.
        """
        if self.excepthook is not None and sys.excepthook is self.excepthook[1]:
            sys.excepthook = self.excepthook[0]


def ranks() -> Optional[Ranks]:
    """Who has to agree in the world there is; None for one rank, or none."""
    world: Optional[World] = _core.resource(WORLD)
    return None if world is None else world.ranks


def make(initialise: Callable[[], Any]) -> World:
    """Run ``initialise``, which leaves a world and returns SGLang's coordinator of it, or raises."""
    before = sys.excepthook
    try:
        coordinator = initialise()
    except BaseException:
        sys.excepthook = before
        raise
    after = sys.excepthook
    hooks = None if after is before else (before, after)
    process_group = default_process_group()
    return World(coordinator, open_ranks(process_group), process_group, hooks)
