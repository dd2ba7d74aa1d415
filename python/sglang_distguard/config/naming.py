"""Default names of runners."""

from __future__ import annotations

import os

from sglang_distguard.config.checks import MAX_NAME


def name_of_model(config: object) -> str:
    """Return the last part of ``config.model_path`` in a form allowed in a runner's name."""
    return name_of_path(str(getattr(config, "model_path", "")))


def name_of_path(path: str) -> str:
    """Return the last part of ``path`` in a form allowed in a runner's name."""
    last = os.path.basename(path.rstrip("/"))
    name = "".join(letter if letter.isprintable() else "?" for letter in last)
    return name.strip()[: MAX_NAME // 2] or "runner"
