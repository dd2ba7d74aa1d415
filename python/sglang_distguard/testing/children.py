"""A piece of work in a forked child, which ends with its parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Optional

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed when the process (more exactly: the thread) that started this one ends. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def print_to(file: Path) -> None:
    """Have all that this process prints, C code too, in ``file``."""
    with file.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def fork(work: Callable[[], object], output: Optional[Path] = None) -> int:
    """Do ``work`` in a child of this process, which exits with 0, or with 1 and a traceback when it raises.

    Args:
        work: never returns into the caller's code.
        output: where the child prints; default: where this process does.

    Returns:
        The number of the child; it is the caller's to wait for.
    """
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        end_with_parent()
        if output is not None:
            print_to(output)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads and buffers of the parent are not ours to end
    raise AssertionError
