"""Install and uninstall the hooks. This module has the only record of the installation."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import CodeType, ModuleType
from typing import Any, Literal, Optional, TypeVar

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


# Lock order: this lock is outermost. It is never held while a hook runs. It is reentrant because
# planning or applying may import a module that is to be patched.
_lock = threading.RLock()
#: Seconds; planning and applying take two.
_DEADLINE = 300.0
_installation: Optional[_Installation] = None
_log = logging.getLogger("sglang_distguard")
#: Warnings of ``_tell`` that were logged.
_told: set[str] = set()


def install(
    *,
    reuse: Optional[bool] = None,
    timeout: Optional[float] = None,
    slow_after: Optional[float] = None,
    agreement_timeout: Optional[float] = None,
    groups: Optional[Literal["own", "share"]] = None,
    pinned_loads: Optional[bool] = None,
    streams: Optional[Literal["share", "own"]] = None,
) -> None:
    """Make SGLang's ModelRunners safe to build and run together in this process.

    Works before or after sglang is imported, and from any thread. Modules that are imported later
    are patched at their import. A further call changes only the settings that it names.

    Args:
        reuse: whether an equal request joins the existing world and groups. Default: the
            environment variable ``SGLANG_ALLOW_REUSE_DISTRIBUTED`` when set, else True.
        timeout: seconds that one wait for another thread's initialisation may take. Default: the
            environment variable ``SGLANG_DISTGUARD_TIMEOUT`` when set, else 300.
        slow_after: seconds after which an initialisation that other threads wait for is logged,
            once, as a warning with its thread's stack. Default: the environment variable
            ``SGLANG_DISTGUARD_SLOW_AFTER`` when set, else 30.
        agreement_timeout: seconds that the ranks of a world of several ranks may take for each
            stage of agreeing on a runner. Default: the environment variable
            ``SGLANG_DISTGUARD_AGREEMENT_TIMEOUT`` when set, else 60.
        groups: the communicators of runners in a world of several ranks. "own", the default: each
            runner has its own communicators, and may forward at any time. "share": all runners use
            the same communicators, and the ranks agree on the order of every forward.
        pinned_loads: whether the weights of a runner on a GPU are copied from a mapping of their
            safetensors files that is registered with CUDA, once for all runners that load them at
            the time; the copies of several loads then overlap. At most half of the memory is
            registered at a time. Where registering fails, a warning says so once. Default: the
            environment variable ``SGLANG_DISTGUARD_PINNED_LOADS`` when set, else True.
        streams: the CUDA streams of runners that ``build_runner`` makes on a GPU. "share", the
            default: their code runs on the caller's stream, which is the same for all threads
            unless they choose one. "own": each has a stream, which is current in ``activate``.
            Tensors on the GPU that were made outside of such a with block must live until it ends.

    Raises:
        NotSupported: the installed SGLang lacks something that the guard needs. Nothing was
            patched.
        StateInUse: the calling thread is in the middle of importing a module that is to be patched.
        AcquireTimeout: another thread did not end such an import, ``install()`` or ``uninstall()``
            within 300 seconds.
        TypeError, ValueError: an argument or environment variable is not usable.
    """
    _install(
        True,
        reuse=reuse,
        timeout=timeout,
        slow_after=slow_after,
        agreement_timeout=agreement_timeout,
        groups=groups,
        pinned_loads=pinned_loads,
        streams=streams,
    )


def install_for_sglang() -> None:
    """Do what ``install`` does in a process that SGLang has started; its plugin calls this.

    The process stays SGLang's, as far as no program in it has called ``install`` (``config.host``).

    Raises:
        NotSupported, StateInUse, AcquireTimeout, ValueError: see ``install``.
    """
    _install(False)


def _install(by_program: bool, **given: Any) -> None:
    until = time.monotonic() + _DEADLINE
    while True:
        with _locked():
            again = _installation is not None
            chosen = settings.choose(again=again, **given)
            before = again and settings.installed().is_program
            chosen = replace(chosen, is_program=by_program or before)
            begun = _put_in() if _installation is None else []
            if not begun:
                settings.set_installed(chosen)
                return
        _let_finish(begun, until)


def _put_in() -> list[str]:
    """Install, unless imports of modules to be patched have begun; return the modules' names."""
    global _installation
    chosen = versions.choose()
    plans = {plan.module: plan for plan in chosen.modules}
    installation = _Installation(plans, Watcher(plans, _execute))
    try:
        installation.watcher.start()
        # Looked for only now: every import that begins from now on is watched.
        begun = imports.unfinished(plans)
        if begun:
            installation.watcher.stop()
            return begun
        _apply(list(plans.values()))
        _installation = installation
        _core.call_after_builds(_read_directly)
        _tell(chosen)
    except BaseException:
        _installation = None
        _undo(installation)
        raise
    return []


def _tell(plan: versions.Plan) -> None:
    """Log once per process what the user of this SGLang must know."""
    for warning in plan.warnings():
        if warning not in _told:
            _told.add(warning)
            _log.warning(warning)
    if plan.absent:
        names = ", ".join(f"{it.module}.{it.name}" for it in sorted(plan.absent))
        _log.debug("sglang %s has nothing for %s", plan.release, names)


def _let_finish(begun: list[str], until: float) -> None:
    """Wait until the imports in ``begun``, which are not watched, have ended.

    The lock must not be held: these imports may import other modules, which are watched.

    Raises:
        StateInUse: the calling thread itself is in the middle of such an import.
        AcquireTimeout: an import has not ended at the time ``until``.
    """
    for name in begun:
        if imports.is_mine(name):
            raise StateInUse(
                f"install() was called while the same thread is importing {name}: functions that "
                "the module has not defined yet would stay without hooks. Call install() before or "
                "after the import",
                holders=[name],
            )
        if not imports.let_finish(name, until - time.monotonic()):
            raise AcquireTimeout(
                f"another thread has been importing {name} for {_DEADLINE:.0f} s. Nothing was "
                "changed. Look at what that thread does (py-spy dump), and call install() again"
            )


def uninstall() -> None:
    """Remove the hooks: SGLang's modules are then as they were, object for object.

    Patches that other code put on top of the guard's hooks stay. Does nothing when the guard is not
    installed.

    Raises:
        StateInUse: runners or managers that need their own scope are still alive: they would
            silently read another one's configuration. ``close()`` them first. Or a thread is in a
            method of one, waits to enter one, or is in the with block of ``activate``.
        AcquireTimeout: another thread did not end an ``install()``, ``uninstall()`` or the import
            of a patched module within 300 seconds.
    """
    global _installation
    with _locked():
        if _installation is None:
            return
        _refuse_inside()
        held = [scope.label for scope in _core.live_scopes() if _core.live_residents(scope) > 0]
        if held:
            raise StateInUse(
                f"uninstall() refused: {len(held)} runner(s) or managers have a scope of their own "
                "and would read another runner's configuration without the guard: "
                f"{', '.join(sorted(held))}. close() them first",
                holders=sorted(held),
            )
        installation, _installation = _installation, None
        _undo(installation)
        environ = _imported("sglang.srt.environ")
        if environ is not None:
            environment.hand_over(environ)


def _refuse_inside() -> None:
    """Refuse while code is running inside the hooks: it would continue without the guard.

    Raises:
        StateInUse: a thread is in a method of a runner or manager, in ``activate``, or waits for a
            phase.
    """
    visits = [
        f"{visit['step'] or visit['phase']} of runner {visit['by']['runner']!r} "
        f"(thread {visit['by']['thread_name']})"
        for visit in _core.snapshot()["phases"]
    ]
    blocks = [f"activate({name!r}) (thread {thread})" for thread, name in _core.activations()]
    calls = [
        f"{method}() of {manager!r} (thread {thread})"
        for thread, manager, method in _core.calls_inside()
    ]
    inside = sorted([*visits, *blocks, *calls])
    if inside:
        raise StateInUse(
            f"uninstall() refused: {', '.join(inside)} would continue without the guard. Wait "
            "until that has ended",
            holders=inside,
        )


def _locked(timeout: float = _DEADLINE) -> _core.Locked:
    """Hold the lock in a with block, within ``timeout`` seconds."""
    return _core.Locked(_lock, timeout, _timed_out)  # a child that is forked in it has another one


def _timed_out() -> AcquireTimeout:
    return AcquireTimeout(
        "another thread has been in install(), uninstall() or the import of a patched module "
        f"for {_DEADLINE:.0f} s. Nothing was changed. Look at what that thread does (py-spy dump)"
    )


def before_fork() -> None:
    """Wait for another thread's ``install`` or ``uninstall``: a child has all hooks or none."""
    # Not for ever: that thread may wait for an import that the forking thread is in.
    _lock.acquire(timeout=10)


def after_fork_in_parent() -> None:
    """Undo ``before_fork``."""
    with suppress(RuntimeError):  # ``before_fork`` had timed out
        _lock.release()


def after_fork_in_child() -> None:
    """Undo ``before_fork`` in the child, where no other thread can hold the lock."""
    global _lock
    _lock = threading.RLock()


def is_installed() -> bool:
    """Whether the guard is installed in this process."""
    return _installation is not None


def _apply(plans: list[ModulePlan]) -> None:
    imported = {plan.module: _imported(plan.module) for plan in plans}
    functions = functions_by_module(module for module in imported.values() if module is not None)
    for plan in plans:
        module = imported[plan.module]
        if module is not None:
            plan.apply(module, functions[id(module)])


def _read_directly() -> None:
    """Give functions that make all their reads at once their own code until the next scope.

    Does nothing when it would have to wait for another thread: reading through accessors is right,
    too. Otherwise a build would fail because of an import.
    """
    with suppress(AcquireTimeout), _locked(timeout=0):
        if _installation is not None:
            for plan in _installation.plans.values():
                plan.read_directly()


def _imported(name: str) -> Optional[ModuleType]:
    """The module, when its import has finished; otherwise its import calls ``_execute``."""
    return None if imports.is_initializing(name) else sys.modules.get(name)


def _execute(
    module: ModuleType,
    code: Optional[CodeType],
    run: Callable[[Optional[CodeType]], None],
) -> None:
    """Execute a module that has a plan (imported, imported again, reloaded), and change it.

    The lock is not held during the execution, which imports other modules: each of those has a
    lock, too.
    """
    begun: Optional[Applied] = None
    with _locked():
        installation = _installation
        if installation is not None and code is not None:
            begun, code = _or_out(lambda plan, own=code: plan.begin(module, own), module)
    try:
        with _core.run_as(None):  # the module belongs to the process, not to the first importer
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
        if begun is not None:  # the guard was uninstalled meanwhile
            begun.undo()
        if _installation is not None:
            _or_out(lambda plan: plan.apply(module, again=True), module)


def _or_out(change: Callable[[ModulePlan], Made], module: ModuleType) -> Made:
    """Make ``change``; when it fails, undo the installation, and let the import fail.

    A partly installed guard is worse than none.
    """
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
    _core.call_after_builds(None)
    _core.read_through_accessors()
    plans = [plan for plan in installation.plans.values() if plan.applied_to]
    functions = functions_by_module(module for plan in plans for module in plan.applied_to)
    for plan in reversed(plans):
        plan.undo(functions)
