"""The room lock: phases of runners that may overlap do, those that may not wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Optional

from sglang_distguard import _core, settings, waiting

Room = Literal["load", "forward", "capture"]


@contextmanager
def room(name: Room, runner: Optional[str] = None) -> Iterator[None]:
    """Keep out of the way, for a with block, of what conflicts with phase ``name``, and keep that out.

    Loads and forwards overlap freely; a capture is alone (the table is in
    rust/core/src/rooms.rs). First come, first served; a thread does not conflict with itself.

    Args:
        name: of the phase.
        runner: whose phase it is, for messages; default: the name in force.

    Raises:
        AcquireTimeout: the deadline of the settings in force has passed.
        DeadlockError: waiting would never end.
    """
    chosen = settings.current()
    visit = _core.Visit(name, runner=runner or chosen.name)
    try:
        waiting.until(
            lambda: visit.try_enter() or None, visit, timeout=chosen.timeout, what=f"room:{name}"
        )
        yield
    finally:
        visit.leave()
