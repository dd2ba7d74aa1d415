"""Measures how long after SIGINT a wait ends, beside a plain ``Event.wait`` in the same run.

.venv/bin/python benchmarks/interrupt_latency.py [TRIALS]
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from sglang_distguard import _core
from sglang_distguard.sync import waiting


def wait_for_a_key() -> None:
    request = _core.Request(
        "groups:never", {}, runner=None, reuse=True, reentrant=False, slow_after=300.0
    )
    waiting.until(lambda: request.try_acquire(None), request, timeout=300, what="a key")


def wait_for_a_phase() -> None:
    visit = _core.Visit("forward", runner=None)
    waiting.until(lambda: visit.try_enter() or None, visit, timeout=300, what="a phase")


def wait_for_an_event() -> None:
    threading.Event().wait(300)


@contextmanager
def another_thread_has_both():
    """Another thread leads the key and is in the capture phase until the with block ends."""
    has, finish = threading.Event(), threading.Event()

    def hold() -> None:
        request = _core.Request(
            "groups:never", {}, runner=None, reuse=True, reentrant=False, slow_after=300.0
        )
        claim, visit = request.try_acquire(None), _core.Visit("capture", runner=None)
        has.set()
        finish.wait()
        assert claim is not None
        claim.fail("done")
        visit.leave()

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait()
    try:
        yield
    finally:
        finish.set()
        thread.join()


@contextmanager
def busy(threads: int):
    """Run this many threads that compute in Python all the time."""
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1000))

    started = [threading.Thread(target=compute) for _ in range(threads)]
    for thread in started:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in started:
            thread.join()


def interrupt(delay: float, sent: list[float]) -> None:
    """Send SIGINT to this process after ``delay`` seconds and note when."""
    time.sleep(delay)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)


def latency(wait: Callable[[], None], trials: int) -> list[float]:
    """Milliseconds from SIGINT to KeyboardInterrupt, at ``trials`` different moments of a wait."""
    found = []
    for trial in range(trials):
        sent: list[float] = []
        # Long enough for the main thread to be waiting, at a moment of its slices that varies.
        thread = threading.Thread(target=interrupt, args=(0.5 + 0.1 * trial / trials, sent))
        thread.start()
        try:
            wait()
        except KeyboardInterrupt:
            found.append((time.perf_counter() - sent[0]) * 1000)
        thread.join()
    return found


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 25
    # A shell makes the processes that it starts in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"milliseconds from SIGINT to KeyboardInterrupt, {trials} trials each: median, maximum")
    waits = {
        "key": wait_for_a_key,
        "phase": wait_for_a_phase,
        "threading.Event (compare)": wait_for_an_event,
    }
    for threads in (0, 4):
        for name, wait in waits.items():
            with another_thread_has_both(), busy(threads):
                found = latency(wait, trials)
            print(
                f"{name:26} {threads} busy threads   "
                f"{statistics.median(found):6.1f}   {max(found):6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
