"""The end of an engine: its parts, sockets, files and threads are given back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from sglang_distguard.api.closing import close
from sglang_distguard.engines import launch
from sglang_distguard.engines.loops import LoopThread
from sglang_distguard.engines.parts import Part, forget
from sglang_distguard.errors import DistGuardError


def end(
    name: str,
    made: Any,
    parts: Sequence[Part],
    loop: LoopThread,
    one_by_one: ThreadPoolExecutor,
    seconds: float,
) -> None:
    """End every part of an engine, also when ending another one fails.

    Args:
        name: of the engine.
        made: SGLang's Engine; None if the start has failed before there was one.
        parts: its threads that were begun.
        loop: of the frontend.
        one_by_one: the thread of the engine's calls that SGLang allows one at a time.
        seconds: for all of it.

    Raises:
        TimeoutError: a thread has not ended in time; it is named.
    """
    deadline = time.monotonic() + seconds
    left: list[str] = []
    with ExitStack() as last:  # in reverse order
        for part in parts:
            last.callback(launch.remove_files, part.ports)
        if made is not None:
            try:
                close(made.tokenizer_manager, timeout=seconds)
            except (DistGuardError, TimeoutError):  # TimeoutError: its loop does not answer
                left.append(f"{name}-frontend")
                close(made.tokenizer_manager, force=True)
            last.callback(one_by_one.shutdown)
            last.callback(made.send_to_rpc.context.term)
            last.callback(made.send_to_rpc.close, linger=0)
        left += [part.name for part in parts if not part.end(deadline - time.monotonic())]
        if not loop.end(max(0.0, deadline - time.monotonic())):
            left.append(f"{name}-frontend")
    if made is not None and not left:
        forget(made.tokenizer_manager)
    if left:
        raise TimeoutError(
            f"engine {name!r}: {', '.join(dict.fromkeys(left))} did not end within {seconds:g} s"
        )
