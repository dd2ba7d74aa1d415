"""An asyncio loop in a thread of its own, with a context of its own."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Optional, TypeVar

_T = TypeVar("_T")


class LoopEnded(RuntimeError):
    """The loop runs nothing any more."""


class LoopThread:
    """Runs coroutines of other threads in one loop, in the context that the loop's own code set up.

    asyncio gives a coroutine that another thread submits the submitter's context, and with it the
    submitter's scope. Here the engine's own one is used.

    Invariant: what is handed over either begins in the loop, or is refused with ``LoopEnded``. The
    lock is held by who hands over, never while it waits, and the loop's thread does not wait for it.
    """

    def __init__(
        self,
        name: str,
        set_up: Callable[[], None],
        failed: Callable[[BaseException], None] = lambda _error: None,
    ) -> None:
        """Make the thread.

        Args:
            name: of the thread.
            set_up: called in the thread, with the loop as its current one, before the loop runs.
                Its error is that of ``started``.
            failed: called in the thread with the error that ended the loop before ``end``.
        """
        self.started: Future[None] = Future()
        self.loop = asyncio.new_event_loop()
        #: Whether tasks are cancelled because the loop ends, and not by their callers.
        self.is_ending = False
        # Of the same thread, too: a handler of a signal may hand over while its thread does.
        self._handing_over = threading.RLock()
        self._is_over = False
        self._context = contextvars.Context()
        self._set_up = set_up
        self._failed = failed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, in a context without any scope: it would inherit the caller's."""
        contextvars.Context().run(self._thread.start)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self._context.run(self._set_up)
        except BaseException as error:
            self.started.set_exception(error)
        else:
            self.started.set_result(None)
            self._run_until(self.loop.run_forever)
        self.is_ending = True
        ending = self.loop.create_task(self._end_all())
        while not ending.done():
            self._run_until(lambda: self.loop.run_until_complete(ending))
        self.loop.close()

    def _run_until(self, run: Callable[[], None]) -> None:
        """Run the loop until it stops, or a task ends it, as SystemExit and KeyboardInterrupt do."""
        try:
            run()
        except BaseException as error:
            self._failed(error)

    def is_here(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return threading.current_thread() is self._thread

    def in_context(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call ``function`` in the calling thread, in a copy of the loop's context."""
        return self._context.copy().run(function, *args, **kwargs)

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run ``coroutine`` in the loop; cancelling the result cancels it.

        Raises:
            LoopEnded: the loop has ended.
        """
        context = self._context.copy()
        with self._handing_over:
            if not self._is_over:
                return context.run(asyncio.run_coroutine_threadsafe, coroutine, self.loop)
        coroutine.close()
        raise LoopEnded(f"the loop of {self._thread.name} has ended")

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call ``function`` in the loop, unless that has ended."""
        with self._handing_over:
            if not self._is_over:
                self.loop.call_soon_threadsafe(function)

    def end(self, timeout: float) -> bool:
        """Cancel what runs in the loop and end it; return whether the thread has ended in time."""
        if self._thread.is_alive():
            self.call_soon(self._stop)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _stop(self) -> None:
        if not self.is_ending:  # a second one would stop what the thread does last
            self.loop.stop()

    async def _end_all(self) -> None:
        """Refuse what is handed over from now on, let the rest begin, and cancel it."""
        while not self._handing_over.acquire(blocking=False):
            await asyncio.sleep(0.001)
        self._is_over = True
        self._handing_over.release()
        # What was handed over becomes a task, and that begins: it sees by itself that this is the end.
        for _ in range(2):
            await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
    """Run ``function`` in a thread of its own: a loop's executor may have no thread to spare."""
    context = contextvars.copy_context()
    done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
    loop = asyncio.get_running_loop()

    def settle(result: Any, error: Optional[BaseException]) -> None:
        if not done.done():
            done.set_exception(error) if error is not None else done.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = context.run(functools.partial(function, *args, **kwargs))
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop has ended without waiting
            pass

    threading.Thread(target=run, name="distguard-blocking", daemon=True).start()
    return await done
