"""Run a function in a forked child of this process and return its result."""

from __future__ import annotations

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any

#: Seconds; a child that takes longer hangs on something its parent's threads held.
DEADLINE = 60


def in_child(work: Callable[[], Any]) -> Any:
    """The result of ``work()`` in a forked child, or the traceback of its error as a ``str``."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        try:
            result = work()
        except BaseException:
            result = traceback.format_exc()
        with os.fdopen(writable, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)  # the child must not end the parent's threads and buffers
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        if not select.select([pipe], [], [], DEADLINE)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"the forked child did nothing for {DEADLINE} s")
        result = pickle.load(pipe)
    assert os.waitpid(child, 0)[1] == 0
    return result


def fresh_registry() -> dict[str, Any]:
    """The registry as a new process sees it; spawned processes run this, too."""
    import sglang_distguard
    from registry_calls import acquire

    before = sglang_distguard.snapshot()
    claim = acquire("groups:of the child", timeout=30)
    claim.publish(identity=7, resource=None)
    return {
        "slots": before["slots"],
        "events": before["events"],
        "decision": claim.decision,
        "generation": claim.generation,
    }


def put_fresh_registry(queue: Any) -> None:
    """``fresh_registry`` for ``multiprocessing``."""
    queue.put(fresh_registry())
