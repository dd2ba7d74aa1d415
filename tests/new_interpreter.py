"""Run programs in new interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from conftest import CACHE

TESTS = Path(__file__).parent
#: Seconds for a program. It imports SGLang and builds at most a few small runners (20 s on two idle
#: cores).
DEADLINE = 240


def run(*parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the dedented parts of a program; ``CACHE`` is defined as the folder of checkpoints.

    Args:
        *parts: Python text; the modules of this folder can be imported.
        **environment: variables on top of this process's.
    """
    text = f"CACHE = {str(CACHE)!r}\n{''.join(map(textwrap.dedent, parts))}"
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": _path(), "PYTHONFAULTHANDLER": "1", **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


def _path() -> str:
    return os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))


def run_well(*parts: str, **environment: str) -> str:
    """Run a program as ``run`` does; it must exit with 0. Return what it printed."""
    done = run(*parts, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
