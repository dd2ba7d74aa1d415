"""Destroy the NCCL communicators that SGLang makes beside torch's, and never destroys.

0.5.23: `GroupCoordinator.destroy` drops its `PyNcclCommunicator`, and `ncclCommDestroy` has no caller,
so that its memory (487 MiB for two ranks on H200) and its threads stay until the process ends.

NCCL destroys a communicator only when every CUDA graph that was captured with it is destroyed, and
waits for that (`commDestroySync`, since 2.26). A runner's graphs go with its attributes, later than
its groups. So a thread of its own waits in NCCL, without the interpreter's lock.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

_log = logging.getLogger("sglang_distguard")
_NAME = "distguard-nccl"
#: Seconds to wait for a communicator whose graphs are gone: it takes a few hundredths.
WAIT = 10.0
#: Threads that have been waited for in vain: user code keeps graphs, say.
_overdue: WeakSet[threading.Thread] = WeakSet()


def destroy_soon(coordinator: Any, *, abort: bool = False) -> None:
    """Destroy the NCCL communicator of a GroupCoordinator, soon: no code can use it from now on.

    Does nothing without one, and nothing a second time.

    Args:
        coordinator: an SGLang GroupCoordinator.
        abort: end kernels that wait in it for another rank, as `ncclCommAbort` does.
    """
    communicator = getattr(coordinator, "pynccl_comm", None)
    if communicator is None:
        return
    communicator.disabled = True
    # One thread gets it. A later use raises AttributeError; it would use freed memory otherwise.
    made = vars(communicator).pop("comm", None)
    if made is None:
        return
    library, device = communicator.nccl, communicator.device

    def end() -> None:
        if device.type == "cuda":
            # NCCL goes back to the thread's device, and CUDA makes a context there (524 MiB).
            sys.modules["torch"].cuda.set_device(device)
        if abort:
            library.NCCL_CHECK(library.lib.ncclCommAbort(made))
        else:
            library.ncclCommDestroy(made)

    threading.Thread(target=_try, args=(end,), name=_NAME, daemon=True).start()


def _try(end: Callable[[], None]) -> None:
    try:
        end()
    except Exception as error:  # its memory stays, as it would in SGLang
        _log.warning("An NCCL communicator of a closed runner was not destroyed: %r", error)


def wait_for_destroyed(seconds: float = WAIT) -> bool:
    """Wait until the communicators that are to be destroyed are; False if some are not.

    Those of graphs that other code refers to are not, and they are waited for once only. A forked
    child has no such threads.

    Args:
        seconds: for all of them together.
    """
    until = time.monotonic() + seconds
    waiting = [thread for thread in threading.enumerate() if thread.name == _NAME]
    for thread in waiting:
        if thread not in _overdue:
            thread.join(max(until - time.monotonic(), 0.0))
    late = [thread for thread in waiting if thread.is_alive()]
    _overdue.update(late)
    return not late
