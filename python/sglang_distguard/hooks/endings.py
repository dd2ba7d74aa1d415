"""How SGLang's managers end: what each has outside of its scope, and who closes it.

In a process of its own a manager ends with the process, and closes nothing (0.5.23). Sockets,
watchdogs and files are noted when they are made (``hooks.host``); the rest is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, Optional

from sglang_distguard import _core
from sglang_distguard.context.scopes import scope_active
from sglang_distguard.runner.handle import release

#: Seconds for a running asyncio loop to close what belongs to it.
_LOOP = 30.0


class Ending(NamedTuple):
    """What is particular to the end of one class of managers.

    Attributes:
        prepare: makes what ``ask`` needs; called once, when the manager has been constructed.
        ask: makes its loop end as SGLang itself does; called before any thread waits for it.
        end: closes what it has outside of its scope; called once, when no call is inside.
        loop: returns the asyncio loop in which ``end`` must be called, if any.
    """

    prepare: Callable[[Any, _core.RunnerHandle], None]
    ask: Callable[[Any], None]
    end: Callable[[Any], None]
    loop: Callable[[Any], Optional[asyncio.AbstractEventLoop]]


def prepare(manager: Any, handle: _core.RunnerHandle) -> None:
    """Make what ``ask`` needs, when the manager has been constructed."""
    _ENDINGS[handle.manager or ""].prepare(manager, handle)


def ask(manager: Any, handle: _core.RunnerHandle) -> None:
    """Let the manager's own event loop end."""
    _ENDINGS[handle.manager or ""].ask(manager)


def end(manager: Any, handle: _core.RunnerHandle) -> bool:
    """Close everything of a manager that is its own, also its runners, without waiting for calls.

    Returns:
        False when that was done before.
    """
    how = _ENDINGS[handle.manager or ""]
    if not handle.end():
        return False

    def close_all() -> None:
        # Every part is closed, even if closing another one fails.
        with contextlib.ExitStack() as stack, scope_active(handle.scope):
            stack.callback(end_parts, handle)
            stack.callback(how.end, manager)

    try:
        _in_loop(how.loop(manager), close_all)
    finally:
        release_all(handle)
    return True


def end_parts(handle: _core.RunnerHandle) -> None:
    """End the sockets and watchdogs of a manager, the last first."""
    with contextlib.ExitStack() as stack:
        for part in handle.take_parts():
            stack.callback(part)


def release_all(handle: _core.RunnerHandle) -> bool:
    """Release what a manager and the runners that it has built hold; False if it was done."""
    for runner in reversed(handle.runners):
        release(runner)
    return release(handle)


def _in_loop(loop: Optional[asyncio.AbstractEventLoop], work: Callable[[], None]) -> None:
    """Call ``work`` in the thread of ``loop``, while that runs; else here."""
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            loop = None
    if loop is None or not loop.is_running():
        work()
        return
    done: Future[None] = Future()

    def do() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    loop.call_soon_threadsafe(do)
    done.result(_LOOP)


#: What an idle Scheduler is woken by; an attribute of its `idle_sleeper`.
_WAKE = "_sglang_distguard_wake"


def _let_wake(scheduler: Any, handle: _core.RunnerHandle) -> None:
    """Let its end wake a Scheduler that sleeps while it is idle: up to a second at a time (0.5.23)."""
    import zmq

    sleeper = getattr(scheduler, "idle_sleeper", None)
    poller = getattr(sleeper, "poller", None)
    if poller is None:
        return
    waits, wakes = socket.socketpair()
    handle.keep_part(waits.close)
    handle.keep_part(wakes.close)
    wakes.setblocking(False)
    poller.register(waits, zmq.POLLIN)
    setattr(sleeper, _WAKE, wakes)


def _ask_scheduler(scheduler: Any) -> None:
    # As its `handle_shutdown` does; each of its loops looks at this (0.5.23).
    scheduler.gracefully_exit = True
    wakes = getattr(getattr(scheduler, "idle_sleeper", None), _WAKE, None)
    if wakes is not None:
        with contextlib.suppress(OSError):  # it has ended, or was asked very often
            wakes.send(b"\0")


def _end_scheduler(scheduler: Any) -> None:
    """As the end of `run_scheduler_process` does (0.5.23)."""
    with contextlib.ExitStack() as stack:
        worker = getattr(scheduler, "async_d2h_worker", None)
        if worker is not None:
            scheduler.async_d2h_worker = None
            stack.callback(worker.shutdown)
        reporter = getattr(scheduler, "metrics_reporter", None)
        if reporter is not None:
            stack.callback(reporter._shutdown_fpm)
        events = getattr(scheduler, "kv_events_publisher", None)
        publisher = getattr(events, "kv_event_publisher", None)
        if publisher is not None:
            stack.callback(publisher.shutdown)
        # Groups with trainers, which torch would keep for the life of the process.
        target = getattr(getattr(scheduler, "tp_worker", None), "model_runner", None)
        groups = getattr(getattr(target, "weight_updater", None), "_model_update_group", {})
        for group in list(groups.values()):
            stack.callback(_destroy_group, group)
        groups.clear()
        load = getattr(scheduler, "load_publisher", None)
        if load is not None:
            stack.callback(load.close)  # may be called again


def _destroy_group(group: Any) -> None:
    from torch import distributed

    distributed.destroy_process_group(group)


def _end_tokenizer_manager(manager: Any) -> None:
    loop = getattr(manager, "event_loop", None)
    if loop is not None and not loop.is_closed():
        current = asyncio.current_task() if loop.is_running() else None
        for name in ("asyncio_tasks", "_lora_release_tasks"):
            for task in list(getattr(manager, name, ())):
                if task is not current:
                    task.cancel()
    for name in ("mm_processor", "cuda_vmm_feature_transport"):
        shutdown = getattr(getattr(manager, name, None), "shutdown", None)
        if shutdown is not None:
            shutdown()


def _nothing(*_: Any) -> None:
    return None


def _ask_detokenizer(manager: Any) -> None:
    """Send it the message that ends its loop (``hooks.managers``), which only waits for messages."""
    import zmq
    from sglang.srt.managers.io_struct import ShutdownReq, sock_send

    endpoint = vars(manager).get(DETOKENIZER_ENDPOINT)
    if endpoint is None:
        return
    context = zmq.Context()
    sender = context.socket(zmq.PUSH)
    try:
        sender.connect(endpoint)
        sock_send(sender, ShutdownReq())
    finally:
        sender.close(linger=1000)
        context.term()


#: Where `DetokenizerManager` receives; noted by ``hooks.managers``.
DETOKENIZER_ENDPOINT = "_sglang_distguard_endpoint"

_ENDINGS = {
    "Scheduler": Ending(_let_wake, _ask_scheduler, _end_scheduler, lambda _: None),
    "TokenizerManager": Ending(
        _nothing, _nothing, _end_tokenizer_manager, lambda it: getattr(it, "event_loop", None)
    ),
    "DetokenizerManager": Ending(_nothing, _ask_detokenizer, _nothing, lambda _: None),
}
