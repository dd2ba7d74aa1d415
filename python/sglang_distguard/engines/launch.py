"""Starts SGLang's parts of one engine in threads, as ``sgl.Engine`` starts processes (0.5.23).

What ``Engine._launch_subprocesses`` does to the whole process is left out: it is the host's
(environment variables, signal handlers, limits, the logger, multiprocessing's start method).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from sglang_distguard.api.closing import close
from sglang_distguard.engines.parts import SCHEDULER, DetokenizerPart, Part, SchedulerPart, own_copy
from sglang_distguard.errors import NotSupported
from sglang_distguard.sync.pacing import Pace

if TYPE_CHECKING:
    from sglang.srt.entrypoints import engine as sgl
    from sglang.srt.server_args import PortArgs

#: Fields of ServerArgs that need further processes, with the values that an engine can have.
_ONE = ("tp_size", "pp_size", "dp_size", "nnodes", "tokenizer_worker_num", "detokenizer_worker_num")
_REFUSED = {
    "weight_cache_mode": "it starts daemons",
    "enable_elastic_expert_backup": "it starts a process for backups",
    "remote_instance_weight_loader_start_seed_via_transfer_engine": "it starts a server of its own",
}


def resolved(name: str, given: dict[str, Any]) -> Any:
    """Make the ``ServerArgs`` of an engine from the arguments of its constructor.

    Args:
        name: of the engine, for messages.
        given: ``server_args`` alone, or fields of ``ServerArgs``.

    Raises:
        TypeError: ``server_args`` beside other arguments.
        NotSupported: the settings need more than one process.
    """
    from sglang.srt.server_args import ServerArgs

    if "server_args" in given:
        if len(given) > 1:
            others = ", ".join(sorted(given.keys() - {"server_args"}))
            raise TypeError(
                f"an Engine takes server_args or fields of ServerArgs, not also {others}"
            )
        server_args = own_copy(given["server_args"])
        # Its default cannot be told from a choice. An idle scheduler that does not sleep takes a
        # core, and the interpreter from all other engines: opening one beside two took minutes.
        with suppress(AttributeError):  # it was published before, and is read-only
            server_args.sleep_on_idle = True
    else:
        # As sgl.Engine: no logs by default.
        server_args = ServerArgs(**{"log_level": "error", "sleep_on_idle": True, **given})
    for field in _ONE:
        value = getattr(server_args, field, 1)
        if value != 1:
            raise NotSupported(
                f"engine {name!r} asks for {field}={value}, which needs {value} processes; an engine "
                f"in this process has one of each part. Use {field}=1, or sgl.Engine in a process of "
                "its own",
                engine=name,
                field=field,
                requested=value,
            )
    for field, reason in _REFUSED.items():
        value = getattr(server_args, field, None)
        if value not in (None, False, "", "off", "none"):
            raise NotSupported(
                f"engine {name!r} asks for {field}={value!r}, which an engine in this process does "
                f"not have: {reason}. Leave it out, or use sgl.Engine in a process of its own",
                engine=name,
                field=field,
                requested=value,
            )
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes"):
        raise NotSupported(
            "SGLANG_RUST_SERVER replaces the parts of an engine by a server of its own; unset it",
            engine=name,
        )
    return server_args


def remove_files(ports: PortArgs) -> None:
    """Remove the files of an engine whose parts have ended: its sockets', which SGLang leaves.

    The file in which its scheduler tells its load ends with that (``hooks.host``), unless it hangs.
    """
    for text in vars(ports).values():
        if isinstance(text, str) and text.startswith("ipc://"):
            Path(text.removeprefix("ipc://")).unlink(missing_ok=True)
    instance = getattr(ports, "instance_id", None)
    if instance is not None:
        from sglang.srt.managers import load_snapshot

        Path(load_snapshot.shm_path_for(instance)).unlink(missing_ok=True)


def launch(
    name: str,
    server_args: Any,
    ended: Callable[[Part], None],
    begun: Callable[[Part], None],
    shares: Any = None,
    memory: Union[int, float, None] = None,
    pace: Optional[Pace] = None,
) -> sgl.Engine:
    """Start the parts of an engine; return SGLang's Engine, without a loop, when it serves.

    The calling thread is the frontend's, which stays in the scope of the TokenizerManager.

    Args:
        name: of the engine.
        server_args: the ``ServerArgs`` from ``resolved``.
        ended: called in each part's thread when it ends.
        begun: called with each part before it is started, so that the caller can end it.
        memory: what its runner may use, if that was chosen; see ``build_runner``.
        pace: of the start, if it shall pause while others compute.
        shares: the runner with which the engine's own one shares weights, if any.

    Raises:
        The error of the part that failed to start.
    """
    import zmq
    from sglang.srt.entrypoints import engine as sgl
    from sglang.srt.parser.template_detection import resolve_auto_parsers
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs
    from sglang.srt.utils.network import get_zmq_socket

    tic = time.perf_counter()
    load_plugins()
    server_args.resolve_once()
    server_args.check_server_args()
    resolve_auto_parsers(server_args)
    ports = PortArgs.init_new(server_args)
    # Each part has a copy of its own: published settings refuse what their own part still resolves.
    scheduler = SchedulerPart(f"{name}{SCHEDULER}", ended, server_args, ports)
    scheduler.shares, scheduler.memory, scheduler.pace = shares, memory, pace
    begun(scheduler)
    detokenizer = None
    if not server_args.skip_tokenizer_init:
        detokenizer = DetokenizerPart(f"{name}-detokenizer", ended, server_args, ports)
        detokenizer.pace = pace
        begun(detokenizer)
    publish(server_args, role="tokenizer")
    scheduler.start()
    if detokenizer is not None:
        detokenizer.start()
    made: Any = sgl.Engine.__new__(sgl.Engine)  # as SGLang's own `attach_tokenizer_worker` does
    made.server_args, made.port_args = server_args, ports
    made._weight_cache_daemon_procs = []
    made.tokenizer_manager, made.template_manager = sgl.init_tokenizer_manager(server_args, ports)
    try:
        if detokenizer is not None:
            detokenizer.ready.result()
        info = scheduler.ready.result()
        made._scheduler_init_result = sgl.SchedulerInitResult(scheduler_infos=[info])
        made._set_startup_time(made.tokenizer_manager, made._scheduler_init_result, tic)
        made.tokenizer_manager.max_req_input_len = info["max_req_input_len"]
        made.send_to_rpc = get_zmq_socket(zmq.Context(2), zmq.DEALER, ports.rpc_ipc_name, True)
    except BaseException:
        close(made.tokenizer_manager)
        raise
    return made
