"""threading, concurrent.futures: threads and tasks that a runner starts run in its scope.

Costs one ContextVar read per started thread or task when no scope is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard import _core
from sglang_distguard.patching import Around
from sglang_distguard.scoping import scope_active


def _start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: Any) -> None:
        scope = _core.current_scope()
        if scope is None:
            original(self)
            return
        run = self.run

        def run_in_scope() -> None:
            del self.run  # the instance attribute below: it would keep thread and scope alive
            _core.adopt_scope(scope)
            run()

        self.run = run_in_scope
        try:
            original(self)
        except BaseException:
            vars(self).pop("run", None)
            raise

    return start


def _submit(original: Callable[..., Any]) -> Callable[..., Any]:
    """A pool's threads outlive the task that made them start: the scope goes with each task."""

    @functools.wraps(original)
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        scope = _core.current_scope()
        if scope is None:
            return original(self, fn, *args, **kwargs)

        @functools.wraps(fn)
        def task(*args: Any, **kwargs: Any) -> Any:
            with scope_active(scope):
                return fn(*args, **kwargs)

        with scope_active(None):
            return original(self, task, *args, **kwargs)

    return submit


CHANGES = (
    Around("threading", "Thread.start", _start),
    Around("concurrent.futures.thread", "ThreadPoolExecutor.submit", _submit),
)
