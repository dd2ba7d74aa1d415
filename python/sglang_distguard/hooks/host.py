"""Acts on the whole process, which SGLang's managers do in their own process, are the host's here.

Such as its title, its log, its signal handlers, its children, and a signal to its parent when a
manager fails. Where a program hosts the managers (``config.host``) they are skipped, and a failure
is raised in the thread that runs the manager. In SGLang's own processes nothing changes.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.config.host import is_host
from sglang_distguard.hooks import endings
from sglang_distguard.hooks.managers import DETOKENIZER, SCHEDULER, TOKENIZER
from sglang_distguard.patching import Around, Replace
from sglang_distguard.runner.garbage import collect_before_pools
from sglang_distguard.runner.handle import find_handle
from sglang_distguard.sync.pacing import pause

_COMMON = "sglang.srt.utils.common"
WATCHDOG = "sglang.srt.utils.watchdog"
_SNAPSHOT = "sglang.srt.managers.load_snapshot"
_log = logging.getLogger("sglang_distguard")
#: Seconds for a zmq context to end, all of whose sockets are closed; it takes milliseconds.
_TERM = 10.0
#: Contexts that have been told to end.
_ending: weakref.WeakSet[Any] = weakref.WeakSet()


class _View:
    """A module as one module of SGLang sees it: in a host, some of its names are others."""

    def __init__(self, module: ModuleType, hosted: dict[str, Any]) -> None:
        self.__replaced__ = module
        self._hosted = hosted

    def __getattr__(self, name: str) -> Any:
        if name in self._hosted and is_host():
            return self._hosted[name]
        return getattr(self.__replaced__, name)


def seen(**hosted: Any) -> Callable[[Any], Any]:
    """Make the hook of a module's reference to another module, some of whose names are others."""

    def make(module: Any) -> Any:
        return module if isinstance(module, _View) else _View(module, hosted)

    return make


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class _Parent:
    """In the place of the parent of a process that hosts a manager."""

    def send_signal(self, number: int) -> None:
        """Raise the error that SGLang is handling, of which this signal would tell the parent."""
        error = sys.exc_info()[1]
        if error is not None:
            raise error
        _log.error("a manager of SGLang is stuck; signal %d to its host was not sent", number)


class _OwnProcess:
    """This process, with a ``_Parent``."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()

    def parent(self) -> _Parent:
        return _Parent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


def _process(pid: Optional[int] = None) -> Any:
    import psutil

    return _OwnProcess() if pid is None else psutil.Process(pid)


def _skipped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Do nothing in a host."""

    @functools.wraps(original)
    def skipped(*args: Any, **kwargs: Any) -> Any:
        return None if is_host() else original(*args, **kwargs)

    return skipped


def _skipped_reference(original: Any) -> Any:
    """Do the same for one module's reference to a function that others may still call."""
    if hasattr(original, "__replaced__"):
        return original
    skipped = _skipped(original)
    setattr(skipped, "__replaced__", original)
    return skipped


def _set_random_seed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Seed the process for the first of its runners only.

    A later one would repeat, or change, the numbers that are drawn for those that run already.
    """

    @functools.wraps(original)
    def set_random_seed(seed: int) -> None:
        here = _core.current_scope()
        others = (scope for scope in (None, *_core.live_scopes()) if scope is not here)
        if is_host() and any(_core.live_runners(scope) for scope in others):
            return
        original(seed)

    return set_random_seed


def _kill_process_tree(original: Any) -> Any:
    """Kill no process of the host from a TokenizerManager; its child processes may be others'."""
    if hasattr(original, "__replaced__"):
        return original

    @functools.wraps(original)
    def kill_process_tree(parent_pid: Any, *args: Any, **kwargs: Any) -> None:
        if not is_host() or parent_pid not in (None, os.getpid()):
            original(parent_pid, *args, **kwargs)

    setattr(kill_process_tree, "__replaced__", original)
    return kill_process_tree


def _print_exception_wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
    """A TokenizerManager whose loop fails tells its callers, and is ended; SGLang kills all."""

    @functools.wraps(original)
    async def print_exception_wrapper(func: Any) -> None:
        manager = getattr(func, "__self__", None)
        handle = None if manager is None else find_handle(manager)
        if handle is None or not is_host():
            await original(func)
            return
        try:
            await func()
        except Exception as error:
            if handle.closed:  # an answer arrived between the manager's end and its loop's
                return
            _log.exception("%s of %r failed", func.__name__, handle.name)
            _fail_requests(manager, error)
            endings.end(manager, handle)

    return print_exception_wrapper


def _fail_requests(manager: Any, error: Exception) -> None:
    """End each request as one that the scheduler has aborted with an internal error (0.5.23)."""
    from http import HTTPStatus

    from sglang.srt.managers.io_struct import AbortReq

    reason = {
        "type": "abort",
        "status_code": HTTPStatus.INTERNAL_SERVER_ERROR,
        "err_type": "InternalServerError",
        "message": f"the TokenizerManager failed: {error!r}",
    }
    for rid in list(manager.rid_to_state):
        manager._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))


def running_manager() -> Optional[_core.RunnerHandle]:
    """The handle of the manager whose code is running; None if there is none."""
    execution = _core.current_execution()
    handle = None if execution is None else execution.runner
    return handle if handle is not None and handle.manager else None


def _get_zmq_socket(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note the sockets of a manager: its end closes them, and their context."""

    @functools.wraps(original)
    def get_zmq_socket(context: Any, *args: Any, **kwargs: Any) -> Any:
        manager = running_manager()
        if manager is not None and context is not type(context)._instance:
            # Before it is bound: where both ends of a connection close at once and messages are left,
            # libzmq (4.3.5) keeps them as long as the listener's copy of this option says. By default
            # that is for ever, whatever `close` is told, and `Context.term` does not return.
            context.linger = 0
        pause()
        made = original(context, *args, **kwargs)
        if manager is not None:
            socket = made[1] if isinstance(made, tuple) else made
            manager.keep_part(functools.partial(_close_socket, context, socket))
        return made

    return get_zmq_socket


def _close_socket(context: Any, socket: Any) -> None:
    """Close a socket with its context, which would block for ever when it is collected."""
    socket.close(linger=0)
    # zmq's global one serves other code, too.
    if context is type(context)._instance or context.closed or context in _ending:
        return
    _ending.add(context)
    for other in list(context._sockets):
        other.close(linger=0)
    # `term` waits for every socket, also for one that other code has made in this context and has
    # closed with messages left. The loop must not wait for that.
    ends = threading.Thread(target=context.term, name="distguard-zmq", daemon=True)
    contextvars.Context().run(ends.start)
    ends.join(_TERM)
    if ends.is_alive():
        _log.warning("a zmq context did not end in %g s; its descriptors are left", _TERM)


def _load_snapshot(original: Callable[..., Any]) -> Callable[..., Any]:
    """Note the file in which a scheduler tells its load, as ``_get_zmq_socket`` does sockets."""

    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        manager = running_manager()
        if manager is not None and made is not None:
            manager.keep_part(functools.partial(_close_snapshot, made))
        return made

    return create


def _close_snapshot(snapshot: Any) -> None:
    snapshot.close()
    # Schedulers of several data-parallel ranks share the file (0.5.23).
    if hasattr(snapshot, "publish_counter") and snapshot.dp_size == 1 and hasattr(snapshot, "path"):
        with suppress(FileNotFoundError):
            os.unlink(snapshot.path)


def _create_scheduler_watchdog(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the watchdog refer to its scheduler weakly: else one that is dropped is never freed."""

    @functools.wraps(original)
    def create_scheduler_watchdog(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        return original(weakref.proxy(scheduler), *args, **kwargs)

    return create_scheduler_watchdog


CHANGES = (
    Around(SCHEDULER, "configure_scheduler_process", _skipped),
    Around(_COMMON, "kill_itself_when_parent_died", _skipped),
    Around(_COMMON, "freeze_gc", _skipped),
    Around(_COMMON, "configure_gc_warning", _skipped),
    Around(_COMMON, "configure_gc_logger", _skipped),
    Around(_COMMON, "set_random_seed", _set_random_seed),
    Replace("sglang.srt.mem_cache.kv_cache_configurator", "gc", seen(collect=collect_before_pools)),
    # The world is every engine's; `teardown` destroys it.
    Around("sglang.srt.distributed.parallel_state", "abort_distributed_environment", _skipped),
    Replace(SCHEDULER, "psutil", seen(Process=_process)),
    Replace(DETOKENIZER, "psutil", seen(Process=_process)),
    Replace(DETOKENIZER, "setproctitle", seen(setproctitle=_nothing)),
    Replace(DETOKENIZER, "configure_logger", _skipped_reference),
    Replace(WATCHDOG, "psutil", seen(Process=_process)),
    # Its condition for its own signal handlers is that it runs on the main thread.
    Replace(TOKENIZER, "threading", seen(main_thread=_nothing)),
    Replace(TOKENIZER, "sys", seen(exit=_nothing)),
    Replace(TOKENIZER, "kill_process_tree", _kill_process_tree),
    Around(TOKENIZER, "print_exception_wrapper", _print_exception_wrapper),
    Around("sglang.srt.utils.network", "get_zmq_socket", _get_zmq_socket),
    Around(_SNAPSHOT, "create_load_snapshot_writer", _load_snapshot),
    Around(_SNAPSHOT, "create_load_snapshot_reader", _load_snapshot),
    Around(
        "sglang.srt.managers.scheduler_components.invariant_checker",
        "create_scheduler_watchdog",
        _create_scheduler_watchdog,
    ),
)
