"""A destroyed coordinator refuses collectives: torch takes the None that SGLang leaves for the world.

0.5.23: `GroupCoordinator.destroy` sets `device_group` and `cpu_group` to None. A forward that comes
to its next collective afterwards would compute with None, for which torch takes the default group:
it waits there for ranks that never come, or is given another collective's numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn

from sglang_distguard.distributed import nccl
from sglang_distguard.errors import LeaseBroken

#: Attributes of a GroupCoordinator that hold torch's process groups.
PROCESS_GROUPS = ("device_group", "cpu_group")


class DestroyedGroup:
    """What a destroyed coordinator has in the place of a process group."""

    def __init__(self, coordinator: str) -> None:
        """Stand for a group of the coordinator with this name (SGLang's `unique_name`)."""
        self._coordinator = coordinator

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse: torch reads the collective's method here.

        Raises:
            LeaseBroken: always.
        """
        self._refuse()

    def __hash__(self) -> NoReturn:
        """Refuse: torch looks up a group in its tables here, before some collectives.

        Raises:
            LeaseBroken: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise LeaseBroken(
            f"The process group '{self._coordinator}' was destroyed while code that uses it was "
            "still running: the runner was closed, or a rank left a step half-done. Build the "
            "runner again",
            key=self._coordinator,
            by=None,
            how="destroyed",
        )


def destroy(coordinator: Any, original: Callable[[Any], object]) -> None:
    """Destroy a GroupCoordinator, which refuses collectives from the first moment on.

    Does nothing to one that is destroyed. If ``original`` raises, the coordinator keeps the process
    groups that still exist.

    Args:
        coordinator: an SGLang GroupCoordinator, which other threads may be using.
        original: SGLang's `GroupCoordinator.destroy`.
    """
    ending = copy.copy(coordinator)
    before = {name: getattr(coordinator, name) for name in PROCESS_GROUPS}
    if all(isinstance(group, DestroyedGroup) for group in before.values()):
        return
    nccl.destroy_soon(coordinator)
    # SGLang destroys a copy: the original never has None for a group, not even for a moment.
    destroyed = DestroyedGroup(str(getattr(coordinator, "unique_name", "unnamed")))
    for name, group in before.items():
        setattr(coordinator, name, destroyed)
        if isinstance(group, DestroyedGroup):
            setattr(ending, name, None)
    try:
        original(ending)
    except BaseException:
        for name in PROCESS_GROUPS:
            if getattr(ending, name) is not None:
                setattr(coordinator, name, before[name])
        raise
    finally:
        for name, value in vars(ending).items():
            if value is None and name not in PROCESS_GROUPS:
                setattr(coordinator, name, None)
