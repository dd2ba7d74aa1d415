"""``Engine``: SGLang's engine in this process, for any number of threads and asyncio loops.

States::

    from      by                      to
    -         Engine(...)             starting; the constructor returns when it serves, or raises
    starting  all parts are ready     serving
    starting  a part fails            closed (the constructor raises the part's error)
    serving   a part ends by itself   failed: pending and later calls raise `EngineFailed`
    serving   close()                 closing: later calls raise `EngineClosed`; pending ones go on
    closing   a part ends by itself   closing: pending calls raise `EngineFailed`
    closing   drained, or deadline    closed: what still runs is aborted
    failed    close()                 closed
    any       interpreter's exit      closed, without draining (``engines.at_exit``)

Invariants:
- A request ends: with its result, its own error, `EngineFailed`, `EngineClosed` or the caller's
  cancellation.
- A failed engine affects no other engine, and signals no process.

Lock order: `_lock` is a leaf; nothing is called with it held.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import os
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Optional, Union

from sglang_distguard.config import settings
from sglang_distguard.config.checks import check_flag, check_memory, check_name, check_seconds
from sglang_distguard.config.naming import name_of_model
from sglang_distguard.context import metrics
from sglang_distguard.engines import at_exit, ending, launch
from sglang_distguard.engines.context_manager import Closes
from sglang_distguard.engines.loops import LoopEnded, LoopThread, in_thread
from sglang_distguard.engines.parts import Part
from sglang_distguard.engines.refusals import CHANGING_WEIGHTS, ONE_BY_ONE, refuse
from sglang_distguard.engines.requests import Bridge, Request
from sglang_distguard.engines.weights import HasWeights, refuse_if_shared, source_of
from sglang_distguard.errors import DistGuardError, EngineClosed, EngineFailed, ForkedError
from sglang_distguard.process.installation import is_installed
from sglang_distguard.runner.handle import find_handle
from sglang_distguard.sync.pacing import Pace, starting

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

#: How long the parts may take to end once they are asked to, in seconds.
_ENDING = 60.0
_ENDING_FAILED = 5.0
_NO_MORE = object()


class Engine(Closes, HasWeights):
    """SGLang's engine as threads of this process; see ``sgl.Engine`` for its arguments and methods.

    Every public method of the installed ``sgl.Engine`` is there (docs/engines.md has the table).
    The methods may be called from any thread, and the asynchronous ones from any asyncio loop, any
    number at a time. It is a context manager, also an asynchronous one.
    """

    def __init__(
        self,
        *,
        name: Optional[str] = None,
        start_timeout: float = 600.0,
        share_weights_with: Optional[HasWeights] = None,
        memory: Union[int, float, None] = None,
        paced: bool = True,
        **arguments: Any,
    ) -> None:
        """Start the engine; return when it serves.

        Args:
            name: name in errors, logs and ``snapshot()``. Default: from the model's path.
            start_timeout: seconds that starting may take, loading the model included.
            share_weights_with: an engine of the same checkpoint and settings, with which it shares
                the memory of weights (of the target alone, where it has a draft model).
            memory: what it may use of its device for weights and key-value cache, also a draft
                model's; see ``build_runner``.
            paced: whether the start pauses again and again while other engines of the process have
                requests to answer, which otherwise hardly get the interpreter meanwhile. It takes up
                to seven times as long then.
            **arguments: ``server_args=ServerArgs(...)``, or fields of ``ServerArgs``. An engine
                sleeps while it is idle, unless the field ``sleep_on_idle=False`` is given, or
                ``server_args`` that were published before say so.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or out of range.
            NotSupported: the settings need more than one process, or move weights that were to be
                shared.
            NotEnoughMemory: see ``build_runner``.
            SpecMismatch: the weights that were to be shared differ.
            DistGuardError: ``install()`` was not called.
            TimeoutError: it did not serve in time.
            Exceptions of SGLang for settings or files that it cannot use. Nothing is left then.
        """
        if name is not None:
            check_name(name)
        check_seconds("start_timeout", start_timeout)
        if memory is not None:
            check_memory("memory", memory)
        check_flag("paced", paced)
        if not is_installed():
            raise DistGuardError("an Engine needs the guard: call sglang_distguard.install() first")
        self._server_args = launch.resolved(name or "engine", arguments)
        self.name = name if name is not None else name_of_model(self._server_args)
        self._lock = threading.Lock()
        self._failure: Optional[BaseException] = None
        self._is_closing = False
        self._is_closed = threading.Event()
        self._pending: set[asyncio.Task[Any]] = set()
        self._submitted: set[Future[Any]] = set()
        self._begun: list[Part] = []
        self._made: Any = None
        self._one_by_one = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name}-rpc")
        self._process = os.getpid()
        self._shares = source_of(share_weights_with)
        self._budget = memory
        self._pace = Pace(at_exit.is_any_answering) if paced else None
        self._loop = LoopThread(f"{self.name}-frontend", self._launch, self._fail)
        at_exit.note(self)
        try:
            self._loop.start()
            self._loop.started.result(start_timeout)
        except concurrent.futures.TimeoutError:
            self._end_failed_start()
            raise TimeoutError(
                f"engine {self.name!r} did not serve within {start_timeout:g} s; a larger model "
                "needs a larger start_timeout"
            ) from None
        except BaseException:
            self._end_failed_start()
            raise

    def _launch(self) -> None:
        shares, self._shares = self._shares, None
        pace, begun = self._pace, self._note_begun
        try:
            with settings.runner_scope(self.name), starting(pace):
                made: Any = launch.launch(
                    self.name, self._server_args, self._ended, begun, shares, self._budget, pace
                )
        finally:
            if pace is not None:
                pace.end()
        made.loop = Bridge(self._submit)
        self._made = made

    @property
    def failure(self) -> Optional[BaseException]:
        """What made the engine fail; None while it has not."""
        return self._failure

    @property
    def model_path(self) -> str:
        """Path of the model that the engine was opened with."""
        return str(self._server_args.model_path)

    @property
    def pending(self) -> int:
        """Number of calls that are not answered yet."""
        return len(self._submitted)

    def metrics(self) -> str:
        """Return what SGLang measures of this engine, in Prometheus's text format.

        It is empty without ``enable_metrics=True``. Of an engine that has failed it has the parts
        that have not ended.

        Raises:
            EngineClosed: the engine is closed.
        """
        return metrics.text(self.metric_families())

    def metric_families(self, **labels: str) -> list[Metric]:
        """As ``metrics``, as prometheus_client's objects; ``labels`` are added to each sample."""
        self._check(may_have_failed=True)
        managers = [self._made.tokenizer_manager, *(part.manager for part in self._begun)]
        handles = [find_handle(manager) for manager in managers]
        return metrics.families([it.scope for it in handles if it is not None], labels)

    # How parts end

    def _ended(self, part: Part) -> None:
        """A part's thread has ended; the engine has failed unless it told the part to end.

        So it may fail while ``close`` waits for requests, which hear of it at once.
        """
        if not part.is_told:
            self._fail(part.error or RuntimeError(f"the thread {part.name} has ended"))

    def _fail(self, cause: BaseException) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = cause
        self._loop.call_soon(self._cancel_pending)

    def _note_begun(self, part: Part) -> None:
        """A part is about to start; none does once the start has been given up."""
        with self._lock:
            if self._is_closing:
                raise EngineClosed(
                    f"engine {self.name!r} was closed while it started", engine=self.name
                )
            self._begun.append(part)

    def _cancel_pending(self) -> None:
        for task in list(self._pending):
            task.cancel()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ForkedError(
                f"engine {self.name!r} was opened in process {self._process}; this forked child "
                f"({os.getpid()}) does not have its threads. Open an engine here",
                engine=self.name,
            )

    def _check(self, *, may_have_failed: bool = False) -> None:
        self._check_process()
        if self._is_closing:
            raise EngineClosed(
                f"engine {self.name!r} is closed; open another one", engine=self.name
            )
        if self._failure is not None and not may_have_failed:
            raise self._failed()

    def _failed(self) -> EngineFailed:
        cause = self._failure
        error = EngineFailed(
            f"engine {self.name!r} has failed: {type(cause).__name__}: {cause}. Other engines go on; "
            "close it and open another one in its place",
            engine=self.name,
            cause=f"{type(cause).__name__}: {cause}",
        )
        error.__cause__ = cause
        return error

    # Running coroutines in the frontend's loop

    async def _here(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run ``coroutine`` as one request: it ends with the engine."""
        try:
            self._check()
        except BaseException:
            coroutine.close()
            raise
        task = asyncio.ensure_future(coroutine)
        self._pending.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if not self._loop.is_ending and asyncio.current_task().cancelling():  # type: ignore
                raise  # by the caller, whom no other error would reach
            if self._failure is not None:
                raise self._failed() from self._failure
            if self._is_closing and task.cancelled():
                raise EngineClosed(
                    f"engine {self.name!r} was closed before this request was answered; "
                    "close(drain=...) waits for requests",
                    engine=self.name,
                ) from None
            raise
        finally:
            if not task.done():
                task.cancel()
            self._pending.discard(task)

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        try:
            self._check()
            future = self._loop.submit(self._here(coroutine))
        except BaseException as error:
            coroutine.close()
            if isinstance(error, LoopEnded):
                self._check()  # says why
            raise
        self._submitted.add(future)
        future.add_done_callback(self._submitted.discard)
        return future

    def _refuse_here(self) -> None:
        if self._loop.is_here():
            raise RuntimeError(
                f"a synchronous method of engine {self.name!r} was called in the engine's own loop; "
                "use the asynchronous one"
            )

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop.is_here():
            coroutine.close()
        self._refuse_here()
        future = self._submit(coroutine)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, too: the request is aborted
            future.cancel()
            raise

    # Requests

    def generate(self, *args: Any, stream: bool = False, **kwargs: Any) -> Any:
        """As ``sgl.Engine.generate``: a result, a list of results, or an iterator with ``stream``.

        Raises:
            EngineFailed: the engine has failed, before or meanwhile.
            EngineClosed: the engine is closed.
            Exceptions of SGLang for requests that it refuses.
        """
        request = self._request(args, {**kwargs, "stream": stream})
        if stream:
            return self._chunks(request)
        return self._wait(request.first())

    async def async_generate(self, *args: Any, stream: bool = False, **kwargs: Any) -> Any:
        """As ``generate``, without blocking; with ``stream`` it returns an asynchronous iterator.

        Cancelling the caller aborts the request.
        """
        request = self._request(args, {**kwargs, "stream": stream})
        if stream:
            return self._async_chunks(request)
        return await self._awaited(request.first())

    def _request(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
        self._check()
        signature = inspect.signature(self._made.async_generate)
        given = signature.bind(*args, **kwargs).arguments
        if given.get("rid") is None:
            given["rid"] = uuid.uuid4().hex
        return Request(self._made, given)

    def _chunks(self, request: Request) -> Iterator[Any]:
        chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        done = self._submit(request.stream(chunks.put))
        done.add_done_callback(lambda _: chunks.put(_NO_MORE))
        try:
            while (chunk := chunks.get()) is not _NO_MORE:
                yield chunk
            done.result()
        finally:  # the caller may not want the rest
            done.cancel()

    async def _async_chunks(self, request: Request) -> AsyncIterator[Any]:
        chunks: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(chunk: Any) -> None:
            with suppress(RuntimeError):  # the caller's loop has ended without waiting
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

        done = self._submit(request.stream(put))
        done.add_done_callback(lambda _: put(_NO_MORE))
        try:
            while (chunk := await chunks.get()) is not _NO_MORE:
                yield chunk
            done.result()
        finally:
            done.cancel()

    async def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(self._submit(coroutine))

    def abort(self, rid: str = "", *, all: bool = False) -> None:
        """Abort the request ``rid``, or all requests; also while ``close`` waits for them.

        A request that is over is left alone. All are, once the engine is closed or has failed.

        Args:
            rid: the request's id, as given to ``generate``.
            all: abort every request of this engine.
        """

        async def abort() -> None:
            made = self._made
            if made is not None:
                made.tokenizer_manager.abort_request(rid=rid, abort_all=all)

        self._check_process()
        self._refuse_here()
        try:
            self._loop.submit(abort()).result()
        except (DistGuardError, CancelledError, LoopEnded):
            if not self._is_closing and self._failure is None:
                raise

    def __getattr__(self, name: str) -> Any:
        """The other methods of the installed ``sgl.Engine``, run in the engine's own thread."""
        made = self.__dict__.get("_made")
        if name.startswith("_") or made is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        refuse(name, engine=self.name, device=self._server_args.device)
        found = getattr(made, name)
        if not callable(found):
            return found
        if inspect.iscoroutinefunction(found):

            @functools.wraps(found)
            async def asynchronous(*args: Any, **kwargs: Any) -> Any:
                return await self._awaited(found(*args, **kwargs))

            return asynchronous

        @functools.wraps(found)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            self._check()
            if name in CHANGING_WEIGHTS:
                refuse_if_shared(self, name)
            call = functools.partial(self._loop.in_context, found, *args, **kwargs)
            return self._one_by_one.submit(call).result() if name in ONE_BY_ONE else call()

        return synchronous

    # Ending

    def close(self, drain: float = 30.0) -> None:
        """End the engine and give back everything it has; a second call does nothing.

        Args:
            drain: seconds to wait for pending requests; later ones are refused at once. What is
                still pending then is aborted, with `EngineClosed`.

        Raises:
            TypeError, ValueError: ``drain`` is no number of seconds.
            TimeoutError: a thread of the engine has not ended in a minute; it is named.
        """
        if drain != 0:
            check_seconds("drain", drain)
        if self._loop.is_here():
            raise RuntimeError(f"engine {self.name!r} cannot be closed in its own loop; use aclose")
        if self._process != os.getpid():
            return  # its threads, sockets and files are the parent's
        if not self._loop.started.done():  # at the interpreter's exit only
            self._end_failed_start()
            return
        with self._lock:
            is_second, self._is_closing = self._is_closing, True
        if is_second:
            self._is_closed.wait(_ENDING)
            return
        with ExitStack() as last:  # also after Ctrl-C
            last.callback(self._is_closed.set)
            last.callback(self._end, _ENDING)
            if self._failure is None:
                self._drain(drain)

    async def aclose(self, drain: float = 30.0) -> None:
        """As ``close``, without blocking the caller's loop."""
        await in_thread(self.close, drain)

    shutdown = close

    def _drain(self, seconds: float) -> None:
        async def drained() -> None:
            pending = list(self._pending)
            if pending:
                await asyncio.wait(pending, timeout=seconds)
            self._cancel_pending()

        with suppress(LoopEnded, CancelledError):  # the engine has failed meanwhile
            self._loop.submit(drained()).result()

    def _end(self, seconds: float) -> None:
        made, self._made = self._made, None
        parts, self._begun = self._begun, []
        ending.end(self.name, made, parts, self._loop, self._one_by_one, seconds)

    def _end_failed_start(self) -> None:
        """End what a failed start has begun; a part that still loads ends when it has."""
        with self._lock:
            self._is_closing = True
        try:
            with suppress(TimeoutError):  # the error of the start says more
                self._end(_ENDING_FAILED)
        finally:
            self._is_closed.set()

    def _close_at_end(self) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closing else "failed" if self._failure else "serving"
        return f"<Engine {self.name!r}, {state}>"
