"""Teardown of shared state: refused while runners hold it, unless forced.

Threads that request the state wait until its teardown has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.sync import event_log

#: Whether runners may hold the state, and what they are told then: why it is torn down, in words.
_force: ContextVar[tuple[bool, str]] = ContextVar("sglang_distguard.force", default=(False, ""))
#: Registry key -> teardown that the running code has begun.
_active: ContextVar[Mapping[str, _core.Teardown]] = ContextVar(
    "sglang_distguard.teardown", default=MappingProxyType({})
)


@contextmanager
def tearing_down(*keys: str) -> Iterator[tuple[_core.Teardown, ...]]:
    """Begin the teardown of ``keys``, all or none; the with block destroys their state.

    A key that an outer with block tears down already is part of that teardown.

    Yields:
        One teardown for each key.

    Raises:
        StateInUse: runners hold the state (unless ``forced``), or another thread is initialising
            it or tearing it down.
    """
    outer = _active.get()
    begun: dict[str, _core.Teardown] = {}
    try:
        force, why = _force.get()
        for key in keys:
            if key not in outer:
                begun[key] = _core.begin_teardown(
                    key, runner=settings.current().name, force=force, why=why
                )
    except BaseException as error:
        for state in begun.values():
            state.cancel(f"not begun: {error!r}")
        raise
    token = _active.set({**outer, **begun})
    try:
        for state in begun.values():
            state.start()
        yield tuple(_active.get()[key] for key in keys)
    except BaseException as error:
        for state in begun.values():
            state.poison(f"destroying it failed: {error!r}")
        raise
    finally:
        _active.reset(token)
        event_log.report()
    for state in begun.values():
        state.end()


@contextmanager
def forced(force: bool = True, *, why: str = "") -> Iterator[None]:
    """Allow teardowns in the with block even while runners hold the state.

    Args:
        force: False refuses them as usual.
        why: what LeaseBroken says to those runners about the cause; empty for nothing.
    """
    token = _force.set((force, why))
    try:
        yield
    finally:
        _force.reset(token)


def keeps_adopted(key: str) -> bool:
    """Whether the running code tears down adopted state under ``key``, which is not destroyed."""
    state = _active.get().get(key)
    return state is not None and state.origin == "adopted"
