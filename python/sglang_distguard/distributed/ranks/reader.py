"""The thread that reads the shared log while any thread of this process waits for an entry."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from sglang_distguard.distributed.ranks import failures
from sglang_distguard.distributed.ranks.log import Ranks

_THREAD = "distguard-ranks"
#: Keys that may be left in the store while threads wait for entries.
_LEFT = 20


def start(ranks: Ranks) -> None:
    """Start the reader; call it when `_core.Agreement.begin_wait` says so."""
    # It ends with the last wait. It is a daemon because it may be asleep in the store.
    try:
        threading.Thread(target=_read, args=(ranks,), name=_THREAD, daemon=True).start()
    except BaseException:
        ranks.state.end_reading()
        raise


def _read(ranks: Ranks) -> None:
    """Read the log and apply its entries while a thread of this process waits for them."""
    while (index := ranks.state.next_to_read()) is not None:
        try:
            entry = ranks.read(index)
            if entry is not None:
                if entry["by"] == ranks.rank:
                    ranks.state.read_own(index)
                ranks.state.apply(
                    index, entry["name"], entry["round"], entry["stage"], entry["failure"]
                )
        except Exception as error:  # any error must reach the threads that wait
            ranks.state.lose(failures.lost(failures.describe(error)))
        if len(ranks.left) > _LEFT:
            ranks.tidy()
    ranks.tidy()


def close(ranks: Ranks, seconds: float) -> None:
    """End the reader and the beating thread within ``seconds`` seconds: the process exits.

    A daemon thread that returns from a call into torch after the interpreter's end aborts the
    process.
    """
    until = time.monotonic() + seconds
    ranks.alive.close(seconds)  # first: a lost log would end turns
    ranks.state.lose(failures.lost("this process exits"))
    with suppress(Exception):
        if ranks.state.is_reading():
            ranks.write({"name": "(exit)", "round": 0, "stage": "build", "failure": None})
        for thread in threading.enumerate():
            if thread.name == _THREAD:
                _join(thread, until)


def _join(thread: threading.Thread, until: float) -> None:
    """Join ``thread``, even if another thread is just starting it and it cannot be joined yet."""
    while thread in threading.enumerate():
        left = until - time.monotonic()
        if left <= 0:
            return
        try:
            thread.join(left)
        except RuntimeError:
            time.sleep(0.001)
