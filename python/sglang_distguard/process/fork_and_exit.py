"""The guard's handlers for forks of its process and for the exit of its interpreter."""

from __future__ import annotations

import atexit
import os

from sglang_distguard import _core
from sglang_distguard.distributed import coordinators, nccl
from sglang_distguard.distributed.ranks import log, reader
from sglang_distguard.patching import import_garbage
from sglang_distguard.process import installation
from sglang_distguard.runner import garbage, pinned_loads, streams

#: Seconds that the exit waits for daemon threads in a runner's method, at a store of ranks or in NCCL.
EXIT_GRACE = 5.0


def _in_child() -> None:
    """Start the forked child with a fresh registry, in which inherited state cannot be adopted.

    The child has one thread, and only the memory of its parent's world: gloo's threads do not exist
    in it, and gloo's sockets are the parent's. So world and groups are registered as inherited.
    """
    _core.start_afresh()
    log.start_afresh()
    pinned_loads.FILES.start_afresh()
    streams.start_afresh()
    garbage.LOADS.start_afresh()
    import_garbage.IMPORTS.start_afresh()
    installation.after_fork_in_child()
    for key, group in coordinators.identities().items():
        if group is not None:
            _core.inherit(key, group)


def _at_exit() -> None:
    for ranks in log.opened():
        reader.close(ranks, EXIT_GRACE)
    nccl.wait_for_destroyed(EXIT_GRACE)
    _core.begin_exit(EXIT_GRACE)


def watch() -> None:
    """Register the handlers for forks and interpreter exit; once per process, at import."""
    os.register_at_fork(
        before=installation.before_fork,
        after_in_parent=installation.after_fork_in_parent,
        after_in_child=_in_child,
    )
    atexit.register(_at_exit)
