"""Helpers for tests that call a runner from threads and block it in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Optional

import sglang_distguard as dg
from sglang_distguard.testing import steps


class Blocked:
    """Wrapper of a function whose first call blocks until ``go_on`` is set."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.finished = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.inside.is_set():
            self.inside.set()
            self.go_on.wait()
        result = self._function(*args, **kwargs)
        self.finished = True
        return result


def thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A started thread, and a list that has its result or error once it has ended."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    made = threading.Thread(target=run, name="worker")
    made.start()
    return made, out


@contextmanager
def held_in_thread(*locks: AbstractContextManager[Any]) -> Iterator[None]:
    """Another thread holds ``locks`` in the with block."""
    held, end = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            end.wait()

    holder, _ = thread(hold)
    held.wait()
    try:
        yield
    finally:
        end.set()
        holder.join()


def in_thread(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a new thread; return its result or raise its error."""
    made, out = thread(work)
    made.join()
    if isinstance(out[0], BaseException):
        raise out[0]
    return out[0]


def steps_in_line() -> list[Optional[str]]:
    """The methods of runners that wait for a phase now."""
    return [visit["step"] for visit in dg.snapshot()["phases"] if not visit["inside"]]


def steps_inside() -> list[Optional[str]]:
    """The methods of runners that are in a phase now."""
    return [visit["step"] for visit in dg.snapshot()["phases"] if visit["inside"]]


def logits(runner: Any) -> Any:
    """The logits of a prefill."""
    return steps.generate(runner, steps=0).logits
