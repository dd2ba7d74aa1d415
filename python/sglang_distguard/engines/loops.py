"""An asyncio loop in a thread of its own, with a context of its own."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Optional, TypeVar

_T = TypeVar("_T")


class LoopEnded(RuntimeError):
    """The loop runs nothing any more."""


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
        #: Held while a coroutine is handed to the loop, which closes afterwards or not before.
        self._handing_over = threading.Lock()
        self._is_over = False
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
        else:
            self.started.set_result(None)
            self.loop.run_forever()
        finally:
            with self._handing_over:
                self._is_over = True
            self.loop.run_until_complete(self._cancel_all())  # what came after the first time
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
            LoopEnded: the loop has ended.
        """
        context = self._context.copy()
        with self._handing_over:
            if not self._is_over:
                return context.run(asyncio.run_coroutine_threadsafe, coroutine, self.loop)
        coroutine.close()
        raise LoopEnded(f"the loop of {self._thread.name} has ended")

    def end(self, timeout: float) -> bool:
        """Cancel what runs in the loop and end it; return whether the thread has ended in time."""
        if self._thread.is_alive():
            with suppress(LoopEnded):
                self.submit(self._stop())
        self._thread.join(timeout)
        return not self._thread.is_alive()

    async def _stop(self) -> None:
        await self._cancel_all()
        self.loop.stop()

    async def _cancel_all(self) -> None:
        self.is_ending = True  # it is not their callers who cancel them
        for _ in range(
            2
        ):  # what was handed over becomes a task, which begins, and sees the end itself
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
