"""sglang.srt.runtime_context: whose context `publish` configures and `use_context` activates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard import _core, ownership, settings
from sglang_distguard.patching import Around, Needs
from sglang_distguard.scoping import (
    CONTEXT_MODULE,
    context_snapshot,
    scope_active,
    scope_of_context,
)


def _publish(original: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's `publish` replaces the one context of the process (0.5.23: "last-publish-wins").

    Here it replaces only the caller's own, and only while no runner lives in it; else the calling
    thread gets a scope of its own, in which SGLang's code makes a fresh context by itself.
    """
    namespace = original.__globals__

    @functools.wraps(original)
    def publish(*args: Any, **kwargs: Any) -> Any:
        previous = _core.current_scope()
        ownership.vacate(
            previous
        )  # of a runner that was collected: SGLang compares with its groups
        scope, fresh = _core.choose_scope(settings.current().name or "")
        if fresh:
            _core.adopt_scope(scope)
            try:
                return original(*args, **kwargs)
            except BaseException:
                _core.adopt_scope(previous)
                raise
        before = context_snapshot()
        try:
            return original(*args, **kwargs)
        except BaseException:
            # SGLang's own way back from a failed launch; it writes into the same objects.
            namespace["restore_context"](before)
            _core.abandon_scope(scope)
            raise

    return publish


def _use_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's `use_context` swaps the process's context; here it is the calling thread's."""

    @functools.wraps(original)
    def use_context(context: Any) -> Iterator[Any]:
        with scope_active(scope_of_context(context)):
            yield context

    return use_context


CHANGES = (
    Needs(CONTEXT_MODULE, "snapshot_context"),
    Needs(CONTEXT_MODULE, "restore_context"),
    Needs(CONTEXT_MODULE, "create_context"),
    Around(CONTEXT_MODULE, "publish", _publish),
    Around(CONTEXT_MODULE, "use_context", _use_context),
)
