"""The current CUDA device: torch keeps it for each thread, and SGLang sets it in one (0.5.23).

Methods of a runner compute on the runner's own device (rust/src/device.rs). With one device there is
nothing to do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from sglang_distguard.context import generation


def device_of(gpu_id: Any) -> Optional[int]:
    """Return the index of the device on which a runner with ``gpu_id`` computes.

    None where no other one can be current: it is no CUDA device, or there is no second one.
    """
    if not isinstance(gpu_id, int) or generation.current().device() != "cuda":
        return None
    return gpu_id if sys.modules["torch"].cuda.device_count() > 1 else None


@contextmanager
def keeping_current() -> Iterator[None]:
    """Let the caller's device be current again after the with block."""
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    # The first use of CUDA makes device 0 current.
    before = cuda.current_device() if cuda is not None and cuda.is_initialized() else 0
    try:
        yield
    finally:
        cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
        if cuda is not None and cuda.is_initialized() and cuda.device_count() > 1:
            cuda._maybe_exchange_device(before)  # makes no context on a device that had none
