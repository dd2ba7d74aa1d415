"""The phase lock: phases of runners that may overlap do, those that may not wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.sync import waiting

Phase = Literal["load", "forward", "capture"]


@contextmanager
def in_phase(
    name: Phase,
    handle: Optional[_core.RunnerHandle] = None,
    *,
    timeout: Optional[float] = None,
) -> Iterator[None]:
    """Keep out of the way, for a with block, of what conflicts with phase ``name``, and keep that out.

    Loads and forwards overlap freely; a capture is alone, and what loads a runner is alone with that
    one (the table is in rust/core/src/phases.rs). First come, first served; a thread does not conflict with itself.

    Args:
        name: of the phase.
        handle: whose phase it is; default: of no runner in particular.
        timeout: seconds; default: the setting in force.

    Raises:
        AcquireTimeout: the deadline of the settings in force has passed.
        DeadlockError: waiting would never end.
    """
    chosen = settings.current()
    visit = _core.Visit(name, runner=handle.name if handle else chosen.name, handle=handle)
    try:
        waiting.to_enter(visit, f"phase:{name}", timeout=timeout)
        yield
    finally:
        visit.leave()
