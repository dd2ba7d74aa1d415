"""The world: torch's default process group, and what must be undone when it is destroyed."""

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
    """One world, as its leader made it.

    Attributes:
        coordinator: SGLang's `_WORLD`; None while no code has asked SGLang for one.
        ranks: the ranks that must agree in it; None for one rank.
        process_group: kept so that no other object gets its ``id`` while it counts as the world.
        excepthook: ``sys.excepthook`` before torch installed its own, and torch's; None when torch
            installed none.
    """

    coordinator: Any
    ranks: Optional[Ranks]
    process_group: Any
    excepthook: Optional[tuple[Any, Any]] = None

    def restore_excepthook(self) -> None:
        """Remove torch's excepthook, unless other code has installed another on top.

        torch 2.14.1 chains a hook to the previous one at every ``init_process_group`` and never
        removes it. Each world would stay in memory, and prefix tracebacks once more with its rank.
        """
        if self.excepthook is not None and sys.excepthook is self.excepthook[1]:
            sys.excepthook = self.excepthook[0]


def ranks() -> Optional[Ranks]:
    """Return the ranks that must agree in the present world; None for one rank or no world."""
    world: Optional[World] = _core.resource(WORLD)
    return None if world is None else world.ranks


def make(initialise: Callable[[], Any]) -> World:
    """Run ``initialise`` and return the world that it made.

    Args:
        initialise: makes the world and returns SGLang's coordinator of it.

    Raises:
        Whatever ``initialise`` raised; ``sys.excepthook`` is restored before.
    """
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
