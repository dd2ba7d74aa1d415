"""Runs work in a forked child, which ends with its parent."""

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
    """Have this process killed when its parent (exactly: the starting thread) ends. Linux only."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def print_to(file: Path) -> None:
    """Redirect all output of this process, including that of C code, to ``file``."""
    with file.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)


def fork(work: Callable[[], object], output: Optional[Path] = None) -> int:
    """Run ``work`` in a forked child, which exits with 0, or with 1 and a traceback if it raises.

    Args:
        work: called in the child, which never returns into the caller's code.
        output: file for the output of the child; default: the output of this process.

    Returns:
        The process id of the child; the caller must wait for it.
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
        os._exit(status)  # do not end threads and buffers of the parent
    raise AssertionError
