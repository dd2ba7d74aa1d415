"""sglang.srt.runtime_context: which context `publish` configures and `use_context` activates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context import environment, generation
from sglang_distguard.context.runtime_contexts import MODULE, scope_of_context
from sglang_distguard.context.scopes import keep_published, scope_active
from sglang_distguard.distributed import owned_groups, world
from sglang_distguard.patching import Around

#: The guard's key in SGLang's snapshot, beside SGLang's own "__parallel__".
_ENVIRONMENT = "__environment__"


def _publish(original: Callable[..., Any]) -> Callable[..., Any]:
    """Publish into the caller's own context, or into a fresh one if a runner lives there.

    SGLang's `publish` replaces the one context of the process (0.5.23: "last-publish-wins"). Here
    it replaces only the caller's own context, and only while no runner lives in it. Otherwise the
    running code gets a scope of its own, in which SGLang's code makes a fresh context by itself.
    A publish by code that ended without building is set aside (rust/core/src/scopes.rs).
    """

    @functools.wraps(original)
    def publish(server_args: Any, *args: Any, **kwargs: Any) -> Any:
        # SGLang would compare with the groups of a runner that was garbage-collected.
        owned_groups.destroy_if_vacant(_core.current_scope())
        name = settings.current().name or ""
        # Groups of several ranks stay in the scope where all ranks know them.
        movable = world.ranks() is None

        def is_other() -> bool:
            here = generation.current().published()
            return here is not None and here is not server_args

        with _core.Publishing(name, is_other=is_other, may_put_aside=movable) as publishing:
            before = None if publishing.is_fresh else generation.current().snapshot()
            try:
                environment.resolve(server_args)
                context = original(server_args, *args, **kwargs)
                keep_published(server_args)
                publishing.succeed()
            except BaseException:
                # SGLang restores a failed launch in this way. It writes into the same objects.
                if before is not None:
                    generation.current().restore(before)
                raise
        return context

    return publish


def _use_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """Swap the context of the calling thread only; SGLang's `use_context` swaps the process's."""

    @functools.wraps(original)
    def use_context(context: Any) -> Iterator[Any]:
        with scope_active(scope_of_context(context)):
            yield context

    return use_context


def _create_context(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what resolving writes for the new context's scope (``scope_of_context``)."""

    @functools.wraps(original)
    def create_context(server_args: Any, *args: Any, **kwargs: Any) -> Any:
        with scope_active(_core.new_scope("resolving")):
            environment.resolve(server_args)
        return original(server_args, *args, **kwargs)

    return create_context


def _snapshot_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def snapshot_context() -> dict[str, Any]:
        return {**original(), _ENVIRONMENT: dict(environment.of_scope.value)}

    return snapshot_context


def _restore_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def restore_context(state: dict[str, Any]) -> None:
        original(state)
        if _ENVIRONMENT in state:
            environment.of_scope.value = dict(state[_ENVIRONMENT])

    return restore_context


def _reset_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def reset_context() -> None:
        original()
        environment.of_scope.value = {}

    return reset_context


CHANGES = (
    Around(MODULE, "snapshot_context", _snapshot_context),
    Around(MODULE, "restore_context", _restore_context),
    Around(MODULE, "reset_context", _reset_context),
    Around(MODULE, "create_context", _create_context),
    Around(MODULE, "publish", _publish),
    Around(MODULE, "use_context", _use_context),
)
