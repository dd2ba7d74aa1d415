"""Threads that stop in the middle of something, and who waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import sglang_distguard as dg


class Blocked:
    """A function that stops in the middle of what it stands for, once, until it may go on."""

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
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:
            out.append(error)

    made = threading.Thread(target=run, name="worker")
    made.start()
    return made, out


def queued() -> list[Any]:
    return [it["step"] for it in dg.snapshot()["rooms"] if not it["inside"]]


def inside() -> list[Any]:
    return [it["step"] for it in dg.snapshot()["rooms"] if it["inside"]]
