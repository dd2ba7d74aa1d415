"""What becomes of the guard when its process forks, and when its interpreter exits."""

from __future__ import annotations

import atexit
import os

from sglang_distguard import _core
from sglang_distguard.distributed import coordinators
from sglang_distguard.distributed.ranks import agreement
from sglang_distguard.distributed.ranks.log import opened
from sglang_distguard.process import installation

#: Seconds that the exit waits for daemon threads that are inside a runner's method, or read a log.
EXIT_GRACE = 5.0


def _in_child() -> None:
    """A forked child has one thread, and of its parent's world only the memory.

    What is there now is named to the fresh registry, so that nobody adopts it: gloo's threads did
    not come along, and its sockets are the parent's.
    """
    _core.start_afresh()
    installation.after_fork_in_child()
    for key, group in coordinators.identities().items():
        if group is not None:
            _core.inherit(key, group)


def _at_exit() -> None:
    for ranks in opened():
        agreement.close(ranks, EXIT_GRACE)
    _core.begin_exit(EXIT_GRACE)


def watch() -> None:
    """Register for forks and for the interpreter's exit; once per process, at import."""
    os.register_at_fork(
        before=installation.before_fork,
        after_in_parent=installation.after_fork_in_parent,
        after_in_child=_in_child,
    )
    atexit.register(_at_exit)
