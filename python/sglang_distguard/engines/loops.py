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


class LoopThread:
    """Runs coroutines of other threads in one loop, in the context that the loop's own code set up.

    asyncio gives a coroutine that another thread submits the submitter's context, and with it the
    submitter's scope. Here the engine's own one is used.
    """

    def __init__(self, name: str, set_up: Callable[[], None]) -> None:
        """Make the thread.

        Args:
            name: of the thread.
            set_up: called in the thread, with the loop as its current one, before the loop runs.
                Its error is that of ``started``.
        """
        self.started: Future[None] = Future()
        self.loop = asyncio.new_event_loop()
        self.is_ending = False
        self._context = contextvars.Context()
        self._set_up = set_up
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
            self.loop.close()
            return
        self.started.set_result(None)
        try:
            self.loop.run_forever()
        finally:
            self.loop.close()

    def is_here(self) -> bool:
        """Whether the calling thread is the loop's own."""
        return threading.current_thread() is self._thread

    def in_context(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call ``function`` in the calling thread, in a copy of the loop's context."""
        return self._context.copy().run(function, *args, **kwargs)

    def submit(self, coroutine: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run ``coroutine`` in the loop; cancelling the result cancels it.

        Raises:
            RuntimeError: the loop has ended.
        """
        context = self._context.copy()
        try:
            return context.run(asyncio.run_coroutine_threadsafe, coroutine, self.loop)
        except RuntimeError:
            coroutine.close()
            raise

    def end(self, timeout: float) -> bool:
        """Cancel what runs in the loop and end it; return whether the thread has ended in time."""
        if self._thread.is_alive() and not self.loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._cancel_all(), self.loop)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def _cancel_all(self) -> None:
        self.is_ending = True  # it is not their callers who cancel them
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.loop.stop()


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
