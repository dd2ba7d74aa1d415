"""Puts the hooks in and takes them out. The one record of what is installed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Literal, Optional, TypeVar

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context import environment
from sglang_distguard.errors import AcquireTimeout, StateInUse
from sglang_distguard.hooks import versions
from sglang_distguard.patching import ModulePlan, imports
from sglang_distguard.patching.applied import Applied
from sglang_distguard.patching.code_swap import functions_by_module
from sglang_distguard.patching.imports import Watcher

Made = TypeVar("Made")


@dataclass
class _Installation:
    plans: dict[str, ModulePlan]
    watcher: Watcher


# Lock order: this lock is outermost. It is never held while a hook runs, and reentrant because
# planning or applying may import a module that is to be patched.
_lock = threading.RLock()
#: Seconds; planning and applying take two.
_DEADLINE = 300.0
_installation: Optional[_Installation] = None


def install(
    *,
    reuse: Optional[bool] = None,
    timeout: Optional[float] = None,
    slow_after: Optional[float] = None,
    agreement_timeout: Optional[float] = None,
    groups: Optional[Literal["own", "share"]] = None,
) -> None:
    """Make SGLang's ModelRunners safe to build and run together in this process.

    Works before or after sglang is imported (modules imported later are patched as they come),
    from any thread, and again: a further call only changes the settings it names.

    Args:
        reuse: whether an equal request joins the world and groups that exist. Default: the
            environment variable ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` when set, else True.
        timeout: seconds that one wait for another thread's initialisation may take. Default: the
            environment variable ``SGLANG_DISTGUARD_TIMEOUT`` when set, else 300.
        slow_after: seconds after which an initialisation that others wait for is logged, once, as
            a warning with its thread's stack. Default: the environment variable
            ``SGLANG_DISTGUARD_SLOW_AFTER`` when set, else 30.
        agreement_timeout: seconds that the ranks of a world of several may take for each step of
            agreeing on a runner. Default: the environment variable
            ``SGLANG_DISTGUARD_AGREEMENT_TIMEOUT`` when set, else 60.
        groups: what runners of a world of several ranks do about communicators. "own", the default:
            each has its own, and may forward whenever it wants; "share": all use the same, and the
            ranks agree on the order of every forward.

    Raises:
        NotSupported: the installed SGLang lacks something the guard rests on.
            Nothing was patched.
        StateInUse: called by code that runs while the same thread imports a module to be patched.
        AcquireTimeout: another thread does not end such an import.
        TypeError, ValueError: an argument or environment variable is not usable.
    """
    until = time.monotonic() + _DEADLINE
    while True:
        with _locked():
            chosen = settings.choose(
                again=_installation is not None,
                reuse=reuse,
                timeout=timeout,
                slow_after=slow_after,
                agreement_timeout=agreement_timeout,
                groups=groups,
            )
            begun = _put_in() if _installation is None else []
            if not begun:
                settings.set_installed(chosen)
                return
        _let_finish(begun, until)


def _put_in() -> list[str]:
    """Install, unless modules are being imported whose import began before: those are returned."""
    global _installation
    plans = {plan.module: plan for plan in versions.choose()}
    installation = _Installation(plans, Watcher(plans, _execute))
    try:
        installation.watcher.start()
        # Looked for only now: whatever begins from now on is watched.
        begun = imports.unfinished(plans)
        if begun:
            installation.watcher.stop()
            return begun
        _apply(list(plans.values()))
        _installation = installation
    except BaseException:
        _installation = None
        _undo(installation)
        raise
    return []


def _let_finish(begun: list[str], until: float) -> None:
    """Wait for imports that nobody watches. Not under the lock: they import others that are watched.

    Raises:
        StateInUse: the calling thread itself is in the middle of one.
        AcquireTimeout: one takes longer.
    """
    for name in begun:
        if imports.is_mine(name):
            raise StateInUse(
                f"install() was called while {name} is being imported by the same thread: functions that "
                "it is yet to define would stay without hooks. Call it before the import, or after it",
                holders=[name],
            )
        if not imports.let_finish(name, until - time.monotonic()):
            raise AcquireTimeout(
                f"{name} has been in the middle of its import, by another thread, for {_DEADLINE:.0f} s. "
                "Look at what that does (py-spy dump), and call install() again; nothing was changed"
            )


def uninstall() -> None:
    """Take the hooks out: SGLang's modules are then as they were, object for object.

    Functions that others patched on top of ours keep their patches. Does nothing when not
    installed.

    Raises:
        StateInUse: runners that need their own scope are still alive; they would silently read
            another's configuration. ``close()`` them first. Or code of ours is running: a method of
            a runner, or the with block of ``activate``.
    """
    global _installation
    with _locked():
        if _installation is None:
            return
        _refuse_inside()
        held = [scope.label for scope in _core.live_scopes() if _core.live_runners(scope) > 0]
        if held:
            raise StateInUse(
                f"uninstall() refused: {len(held)} runner(s) have a scope of their own and would "
                f"read another's configuration without the guard: {', '.join(sorted(held))}. "
                "close() them first",
                holders=sorted(held),
            )
        installation, _installation = _installation, None
        _undo(installation)
        environ = _imported("sglang.srt.environ")
        if environ is not None:
            environment.hand_over(environ)


def _refuse_inside() -> None:
    """Code that our hooks let in would go on without what it was let in for.

    Raises:
        StateInUse: a thread is in a method of a runner, in ``activate``, or waits for one of ours.
    """
    visits = [
        f"{visit['step'] or visit['phase']} of runner {visit['by']['runner']!r} "
        f"(thread {visit['by']['thread_name']})"
        for visit in _core.snapshot()["phases"]
    ]
    blocks = [f"activate({name!r}) (thread {thread})" for thread, name in _core.activations()]
    inside = sorted([*visits, *blocks])
    if inside:
        raise StateInUse(
            f"uninstall() refused: {', '.join(inside)} would go on without the guard. Let it end first",
            holders=inside,
        )


@contextmanager
def _locked() -> Iterator[None]:
    lock = _lock  # a fork inside the with block gives the child another one
    if not lock.acquire(timeout=_DEADLINE):
        raise AcquireTimeout(
            f"another thread has been in install(), uninstall() or the import of a patched module for "
            f"{_DEADLINE:.0f} s. Look at what it does (py-spy dump); nothing was changed"
        )
    try:
        yield
    finally:
        lock.release()


def before_fork() -> None:
    """Let another thread's ``install`` or ``uninstall`` finish: a child has all hooks or none."""
    # Not for ever: that thread may wait for an import that the forking thread is in.
    _lock.acquire(timeout=10)


def after_fork_in_parent() -> None:
    """Undo ``before_fork``."""
    with suppress(RuntimeError):  # it had given up
        _lock.release()


def after_fork_in_child() -> None:
    """Undo ``before_fork`` in the child, where no other thread can be at it."""
    global _lock
    _lock = threading.RLock()


def is_installed() -> bool:
    """Whether the hooks are in."""
    return _installation is not None


def _apply(plans: list[ModulePlan]) -> None:
    imported = {plan.module: _imported(plan.module) for plan in plans}
    functions = functions_by_module(module for module in imported.values() if module is not None)
    for plan in plans:
        module = imported[plan.module]
        if module is not None:
            plan.apply(module, functions[id(module)])


def _imported(name: str) -> Optional[ModuleType]:
    """The module, when its import has finished; one that is being imported calls back."""
    return None if imports.is_initializing(name) else sys.modules.get(name)


def _execute(
    module: ModuleType,
    code: Optional[CodeType],
    run: Callable[[Optional[CodeType]], None],
) -> None:
    """Execute a module that has a plan - imported, imported anew, reloaded - and change it.

    The lock is not held meanwhile: executing a module imports others, of which each has a lock, too.
    """
    begun: Optional[Applied] = None
    with _locked():
        installation = _installation
        if installation is not None and code is not None:
            begun, code = _or_out(lambda plan, own=code: plan.begin(module, own), module)
    try:
        with _core.run_as(None):  # it is the process's, whoever imports it first
            run(code)
    except BaseException:
        if begun is not None:
            with _locked():
                still = None if _installation is not installation else installation
                if still is None or not still.plans[module.__name__].keep(begun):
                    begun.undo()
        raise
    with _locked():
        if begun is not None and _installation is installation:
            _or_out(lambda plan, it=begun: plan.finish(it), module)
            return
        if begun is not None:  # the guard was taken out meanwhile
            begun.undo()
        if _installation is not None:
            _or_out(lambda plan: plan.apply(module, again=True), module)


def _or_out(change: Callable[[ModulePlan], Made], module: ModuleType) -> Made:
    """Half a guard is worse than none: when ``change`` fails, what is in comes out, and the import fails."""
    global _installation
    assert _installation is not None
    try:
        return change(_installation.plans[module.__name__])
    except BaseException:
        installation, _installation = _installation, None
        _undo(installation)
        raise


def _undo(installation: _Installation) -> None:
    installation.watcher.stop()
    plans = [plan for plan in installation.plans.values() if plan.applied_to]
    functions = functions_by_module(module for plan in plans for module in plan.applied_to)
    for plan in reversed(plans):
        plan.undo(functions)
