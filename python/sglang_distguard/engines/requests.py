"""Calls of ``sgl.Engine``'s own methods in the engine's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any


class Request:
    """One call of ``async_generate``, in the engine's loop."""

    def __init__(self, made: Any, given: dict[str, Any]) -> None:
        self._made = made
        self._given = given

    async def first(self) -> Any:
        """The result of a request that does not stream."""
        try:
            return await self._made.async_generate(**self._given)
        except asyncio.CancelledError:
            self._abort()
            raise

    async def stream(self, put: Callable[[Any], None]) -> None:
        """Call ``put`` with each chunk."""
        try:
            async with aclosing(await self._made.async_generate(**self._given)) as chunks:
                async for chunk in chunks:
                    put(chunk)
        except asyncio.CancelledError:
            self._abort()
            raise

    def _abort(self) -> None:
        manager, rid = self._made.tokenizer_manager, self._given["rid"]
        # SGLang numbers the requests of a batch with one id (0.5.23 `_normalize_rid`).
        prefixes = tuple([rid] if isinstance(rid, str) else rid)
        for known in [it for it in manager.rid_to_state if it.startswith(prefixes)]:
            manager.abort_request(rid=known)


class Bridge:
    """In the place of ``sgl.Engine.loop``: its synchronous methods run coroutines by it."""

    def __init__(self, submit: Callable[[Any], Future[Any]]) -> None:
        self._submit = submit

    def run_until_complete(self, awaitable: Any) -> Any:
        """Run ``awaitable`` in the engine's loop and wait for it."""

        async def run() -> Any:
            return await awaitable

        future = self._submit(run())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
