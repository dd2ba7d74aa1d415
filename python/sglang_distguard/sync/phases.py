"""The phase lock: conflicting phases of runners wait for each other, all others overlap."""

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
    """Enter phase ``name`` for a with block: wait for conflicting phases, and keep them out.

    Loads and forwards of different runners overlap freely. A capture is alone in the process, and a
    load is alone with its runner (the table is in rust/core/src/phases.rs). Conflicting phases are
    first come, first served; a thread does not conflict with itself.

    Args:
        name: the phase to enter.
        handle: the runner whose phase it is; default: no particular runner.
        timeout: seconds to wait; default: the setting in force.

    Raises:
        AcquireTimeout: ``timeout`` seconds have passed.
        DeadlockError: the wait would never end.
    """
    chosen = settings.current()
    visit = _core.Visit(name, runner=handle.name if handle else chosen.name, handle=handle)
    try:
        waiting.to_enter(visit, f"phase:{name}", timeout=timeout)
        yield
    finally:
        visit.leave()
