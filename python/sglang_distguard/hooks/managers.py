"""SGLang's Scheduler, TokenizerManager and DetokenizerManager live in a scope, as runners do.

Their methods run there, from any thread or loop; so do those of a TpModelWorker, in its runner's
scope. They hold no phase: an event loop is inside one method for its whole life, and the methods of
the runner that it calls take theirs.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, Optional

from sglang_distguard import _core
from sglang_distguard.config.host import is_host
from sglang_distguard.context.scopes import of_published
from sglang_distguard.errors import forget_frames
from sglang_distguard.hooks import endings
from sglang_distguard.patching import Around, Change, WithinMethods
from sglang_distguard.runner.handle import bind_manager, find_handle

_MANAGERS = "sglang.srt.managers."
WORKER = _MANAGERS + "tp_worker"
SCHEDULER = _MANAGERS + "scheduler"
TOKENIZER = _MANAGERS + "tokenizer_manager"
DETOKENIZER = _MANAGERS + "detokenizer_manager"
_MULTI = _MANAGERS + "multi_tokenizer_mixin"


class Manager(NamedTuple):
    """One class of managers.

    Attributes:
        module: its module.
        classname: its name.
        bases: (module, name) of the classes whose methods it has too (0.5.23).
        loops: methods that the manager's end stops, and so does not wait for.
        plain: public methods that read fields of the manager alone, and work when it is closed.
        hooked: public methods with a hook of their own, which enters the scope itself.
    """

    module: str
    classname: str
    bases: tuple[tuple[str, str], ...]
    loops: frozenset[str] = frozenset()
    plain: frozenset[str] = frozenset()
    hooked: frozenset[str] = frozenset()


TABLE = (
    Manager(
        SCHEDULER,
        "Scheduler",
        (
            ("sglang.srt.disaggregation.decode", "SchedulerDisaggregationDecodeMixin"),
            ("sglang.srt.disaggregation.prefill", "SchedulerDisaggregationPrefillMixin"),
            ("sglang.srt.multiplex.multiplexing_mixin", "SchedulerMultiplexMixin"),
            (_MANAGERS + "scheduler_pp_mixin", "SchedulerPPMixin"),
            ("sglang.srt.dllm.mixin.scheduler", "SchedulerDllmMixin"),
            ("sglang.srt.hardware_backend.mlx.scheduler_mixin", "SchedulerMlxOverlapMixin"),
        ),
        plain=frozenset({"handle_shutdown"}),
    ),
    Manager(
        TOKENIZER,
        "TokenizerManager",
        (
            (_MANAGERS + "tokenizer_control_mixin", "TokenizerControlMixin"),
            (_MANAGERS + "tokenizer_manager_score_mixin", "TokenizerManagerScoreMixin"),
        ),
        loops=frozenset({"handle_loop", "sigterm_watchdog"}),
        plain=frozenset(
            {
                "server_status",
                "gracefully_exit",
                "is_pause",
                "is_healthy",
                "is_ready",
                "set_server_stop_hook",
                "set_engine_state_changed_callback",
            }
        ),
    ),
    Manager(
        DETOKENIZER,
        "DetokenizerManager",
        ((_MULTI, "MultiHttpWorkerDetokenizerMixin"),),
        hooked=frozenset({"init_request_dispatcher", "event_loop", "multi_http_worker_event_loop"}),
    ),
)
#: Public methods and properties of TpModelWorker that read its fields or its runner's (0.5.23).
_WORKER_PLAIN = frozenset(
    {
        "model_runner",
        "last_shared_read_runner",
        "sliding_window_size",
        "is_hybrid_swa",
        "graph_memory_usage",
        "graph_time_usage",
        "weight_load_time",
        "preloaded_weights_bytes",
        "weight_update_runners",
        "register_hicache_layer_transfer_counter",
        "register_hisparse_coordinator",
        "is_dllm",
    }
)


#: Is given each manager that a process function of SGLang makes in the running thread.
_made: ContextVar[Optional[Callable[[Any], None]]] = ContextVar(
    "sglang_distguard.made", default=None
)


class _Ended(BaseException):
    """Ends the event loop of a DetokenizerManager."""


def _step_of(manager: Manager, name: str) -> Optional[_core.StepOf]:
    if name in manager.plain | manager.hooked:
        return None
    return _core.StepOf(name, None, counts=name not in manager.loops)


def _worker_step_of(name: str) -> Optional[_core.StepOf]:
    return None if name in _WORKER_PLAIN else _core.StepOf(name, None, runner="_model_runner")


def _init(manager: Manager, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if find_handle(self) is not None:  # a subclass calls its base constructor
            original(self, *args, **kwargs)
            return
        call = signature.bind_partial(self, *args, **kwargs).arguments
        server_args = call.get("server_args")
        made = _made.get()
        with of_published(server_args):
            handle = bind_manager(self, manager.classname, server_args)
            # Its sockets and watchdogs end with it, also when it is dropped without `close`.
            weakref.finalize(self, endings.end_parts, handle).atexit = False
            try:
                endpoint = getattr(call.get("port_args"), "detokenizer_ipc_name", None)
                vars(self)[endings.DETOKENIZER_ENDPOINT] = endpoint
                with _core.step(handle, "construction", None):
                    original(self, *args, **kwargs)
                endings.prepare(self, handle)
                if made is not None:
                    made(self)
            except BaseException as error:
                # The error's frames refer to the manager, which refers to its runner's weights.
                with suppress(Exception):
                    endings.end(self, handle)
                vars(self).clear()
                forget_frames(error)
                raise

    return __init__


def _worker_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Read the configuration where it was published, also before there is a runner."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        call = signature.bind_partial(self, *args, **kwargs).arguments
        with of_published(call.get("server_args")):
            original(self, *args, **kwargs)

    return __init__


def _dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let `ShutdownReq`, which SGLang sends to schedulers only (0.5.23), end the event loop."""

    def end(_request: object) -> None:
        raise _Ended

    @functools.wraps(original)
    def init_request_dispatcher(self: Any, *args: Any, **kwargs: Any) -> None:
        from sglang.srt.managers.io_struct import ShutdownReq
        from sglang.utils import TypeBasedDispatcher

        original(self, *args, **kwargs)
        self._request_dispatcher += TypeBasedDispatcher([(ShutdownReq, end)])

    return init_request_dispatcher


def _event_loop(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the loop end by a message; it only waits for messages."""
    step_of = _core.StepOf(original.__name__, None)

    @functools.wraps(original)
    def event_loop(self: Any) -> None:
        with step_of(self), suppress(_Ended):
            original(self)

    return event_loop


def _end(manager: Any) -> None:
    handle = find_handle(manager)
    if handle is not None:
        endings.end(manager, handle)


def _process_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Run what SGLang runs in a process of its own as one thread of a host, and leave nothing.

    It gets a scope of its own, whatever scope the thread was started in.
    """
    holding = _core.StepOf(original.__name__, None).holding

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> None:
        if not is_host():
            original(*args, **kwargs)
            return
        with ExitStack() as made:

            def note(manager: Any) -> None:
                # Until its end is over, `close` in another thread waits.
                made.enter_context(holding(manager))
                made.callback(_end, manager)

            token = _made.set(note)
            try:
                with _core.run_as(None):
                    original(*args, **kwargs)
            except BaseException as error:
                forget_frames(error)
                raise
            finally:
                _made.reset(token)

    return run


def _changes_of(manager: Manager) -> list[Change]:
    step_of = functools.partial(_step_of, manager)
    methods = [(manager.module, manager.classname), *manager.bases]
    return [
        Around(manager.module, f"{manager.classname}.__init__", functools.partial(_init, manager)),
        *(WithinMethods(module, name, step_of) for module, name in methods),
    ]


CHANGES = (
    *(change for manager in TABLE for change in _changes_of(manager)),
    Around(WORKER, "TpModelWorker.__init__", _worker_init),
    WithinMethods(WORKER, "TpModelWorker", _worker_step_of),
    WithinMethods(WORKER, "BaseTpWorker", _worker_step_of),
    Around(DETOKENIZER, "DetokenizerManager.init_request_dispatcher", _dispatcher),
    Around(DETOKENIZER, "DetokenizerManager.event_loop", _event_loop),
    Around(_MULTI, "MultiHttpWorkerDetokenizerMixin.multi_http_worker_event_loop", _event_loop),
    Around(SCHEDULER, "run_scheduler_process", _process_function),
    Around(DETOKENIZER, "run_detokenizer_process", _process_function),
)
