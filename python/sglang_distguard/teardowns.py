"""Taking shared state down: refused while runners hold it, unless forced; exclusive while it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

from sglang_distguard import _core, groups, journal, settings
from sglang_distguard.errors import DistGuardError
from sglang_distguard.groups import WORLD

_force: ContextVar[bool] = ContextVar("sglang_distguard.force", default=False)
#: What the running code has closed and is destroying.
_active: ContextVar[Mapping[str, _core.Teardown]] = ContextVar(
    "sglang_distguard.teardowns", default=MappingProxyType({})
)


@contextmanager
def tearing_down(*keys: str) -> Iterator[tuple[_core.Teardown, ...]]:
    """Close shared state to everybody else while the with block destroys it: all keys or none.

    What an outer with block has closed is destroyed as a part of that.

    Raises:
        StateInUse: runners hold it, or another thread is initialising it or tearing it down.
    """
    outer = _active.get()
    begun: dict[str, _core.Teardown] = {}
    try:
        for key in keys:
            if key not in outer:
                begun[key] = _core.begin_teardown(
                    key, runner=settings.current().name, force=_force.get()
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
        journal.report()
    for state in begun.values():
        state.end()


@contextmanager
def forced(force: bool = True) -> Iterator[None]:
    """What is torn down inside the with block is so also while runners hold it."""
    token = _force.set(force)
    try:
        yield
    finally:
        _force.reset(token)


def lets_go(key: str) -> bool:
    """Whether the running code takes down what somebody else made: that is not destroyed."""
    state = _active.get().get(key)
    return state is not None and state.origin == "adopted"


def teardown(*, force: bool = False) -> None:
    """Destroy SGLang's groups and world, so that others can be built in this process.

    What distguard adopted (made by somebody else) is let go and not destroyed. Generations go on.

    Args:
        force: also while runners hold them. Those runners raise LeaseBroken at their next use; a
            forward that is running is not stopped, so let none run.

    Raises:
        DistGuardError: ``install()`` was not called.
        StateInUse: runners hold the state (without ``force``; the error lists them), or a thread
            is initialising it or tearing it down. Nothing was changed.
    """
    from sglang_distguard.installation import is_installed

    settings.check_flag("force", force)
    if not is_installed():
        raise DistGuardError("teardown needs the guard: call sglang_distguard.install() first")
    sglang = sys.modules.get("sglang.srt.distributed.parallel_state")
    if sglang is None:  # nothing can have been made
        return
    keys = groups.all_keys()
    with forced(force), tearing_down(WORLD, *keys) as (_world, *states):
        for key, state in zip(keys, states, strict=True):
            if key != groups.GROUPS and state.resource is not None:
                groups.destroy(state.resource)
        sglang.destroy_model_parallel()
        sglang.destroy_distributed_environment()
