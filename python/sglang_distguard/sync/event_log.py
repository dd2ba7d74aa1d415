"""Writes the registry's decisions to the logger ``sglang_distguard``, each once per process.

Decisions that a person may have to act on are warnings; all others are debug messages.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang_distguard import _core
from sglang_distguard.errors import stack_of

logger = logging.getLogger("sglang_distguard")

_WARN = frozenset({"slow", "out-of-band", "poison", "deadlock"})


def report() -> None:
    """Log the decisions made since the last call in this process."""
    for event in _core.take_events():
        level = logging.WARNING if event["decision"] in _WARN else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", _text(event))


def _text(event: dict[str, Any]) -> str:
    actor = event["actor"]
    who = f"thread {actor['thread_name']}"
    if actor["runner"]:
        who = f"runner {actor['runner']!r} ({who})"
    text = f"{event['key']}: {event['decision']} by {who}"
    if event["waited"]:
        text += f" after {event['waited']:.3f} s"
    if event["detail"]:
        text += f": {event['detail']}"
    if event["decision"] == "slow":
        stack = stack_of(actor["thread"])
        if stack:
            text += f"\nThat thread is now at:\n{stack}"
    return text
