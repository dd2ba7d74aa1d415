"""``python -m sglang_distguard serve``: loads models, serves them, and ends at SIGTERM or SIGINT.

States: loading -> serving -> draining -> closed. A signal while models load ends the command when
they are loaded. While it drains, no connection is accepted, and a second signal ends the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from sglang_distguard.api.teardown import teardown
from sglang_distguard.engines.loops import in_thread
from sglang_distguard.engines.pool import Pool
from sglang_distguard.process.installation import install
from sglang_distguard.serving import application, arguments

if TYPE_CHECKING:
    from fastapi import FastAPI

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """What to serve, and where.

    Attributes:
        models: name -> path of the checkpoint.
        settings: name -> fields of ``ServerArgs``; "" has those of models that are loaded later.
        host: address to bind to.
        port: TCP port; 0 takes a free one.
        api_key: of clients; None asks for none.
        admin_key: of the administrator; None refuses to load and unload.
        drain: seconds that pending requests may take after a signal.
        start_timeout: seconds that one model may take to load.
    """

    models: Mapping[str, str]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: Optional[str] = None
    admin_key: Optional[str] = None
    drain: int = 30
    start_timeout: float = 600.0


def run(options: Options) -> int:
    """Serve until a signal; return the exit status.

    0 after a signal, 1 when a model cannot be loaded, 2 when an option cannot be used.
    """
    if options.drain < 0:
        print(f"error: --drain must be 0 or more seconds, not {options.drain}", file=sys.stderr)
        return 2
    try:
        bound = _bound(options.host, options.port)
    except (OSError, OverflowError) as error:
        print(f"error: cannot bind to {options.host}:{options.port}: {error}", file=sys.stderr)
        return 2
    _warn_of_memory(options)
    with bound:
        install()
        try:
            pool = Pool()
            app = application(
                pool,
                api_key=options.api_key,
                admin_key=options.admin_key,
                defaults=options.settings.get("", {}),
            )
        except (TypeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        status = asyncio.run(_serve(options, pool, app, bound))
    teardown()
    return status


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound before models are loaded, and listens when they are."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made


def _warn_of_memory(options: Options) -> None:
    """SGLang gives the cache of an engine most of its device's memory (0.5.23)."""
    limits = ("memory", "max_total_tokens", "mem_fraction_static")
    without = [
        name
        for name in options.models
        if all(options.settings.get(name, {}).get(limit) is None for limit in limits)
    ]
    if without and len(options.models) > 1:
        print(
            f"warning: {', '.join(without)}: no limit of memory, so that the first engine may take "
            "what the others need; use --set NAME.memory=FRACTION, or max_total_tokens",
            file=sys.stderr,
        )


async def _serve(options: Options, pool: Pool, app: FastAPI, bound: socket.socket) -> int:
    server = _server(app, options.drain)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        server.force_exit = server.should_exit  # the second signal
        server.should_exit = True

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        loaded = [_loaded(pool, name, path, options) for name, path in options.models.items()]
        if not all(await asyncio.gather(*loaded)):
            return 1
        if server.should_exit:
            return 0
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        bound.listen(server.config.backlog)
        _say(f"serving {', '.join(options.models) or 'no model yet'} on http://{shown}:{port}")
        await server.serve([bound])
        _say("closing")
        return 0
    finally:
        # What still loads would come into the pool after it was closed.
        await app.state.changes.ended(options.start_timeout)
        await in_thread(pool.close_all, drain=0)
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _server(app: FastAPI, drain: int) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn would raise the signal again when it has ended (0.54), for exit status 143."""
            yield

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain
    )
    return Server(config)


async def _loaded(pool: Pool, name: str, path: str, options: Options) -> bool:
    start = time.perf_counter()
    try:
        fields = arguments.fields_of(name, path, options.settings.get(name, {}))
        await pool.aload(name, start_timeout=options.start_timeout, **fields)
    except (Exception, SystemExit) as error:  # SGLang ends a process whose settings it refuses
        print(f"error: {name}: {path}: {type(error).__name__}: {error}", file=sys.stderr)
        return False
    _say(f"{name}: loaded {path} in {time.perf_counter() - start:.1f} s")
    return True


def _say(line: str) -> None:
    print(line, flush=True)
