"""Code of higher layers in an engine's frontend loop, where SGLang's TokenizerManager lives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.requests import Request

#: Is given ``sgl.Engine`` and a function that takes each item.
Work = Callable[[Any, Callable[[Any], None]], Awaitable[None]]


class _Work(Request):
    """Other work than ``async_generate``, as a request: it ends with the engine."""

    def __init__(self, made: Any, work: Work) -> None:
        super().__init__(made, {})
        self._work = work

    async def stream(self, put: Callable[[Any], None]) -> None:
        # SGLang aborts what a cancelled task has asked for (0.5.23 `generate_request`).
        await self._work(self._made, put)


def items(engine: Engine, work: Work) -> AsyncIterator[Any]:
    """Run ``work`` in the engine's frontend loop and scope; yield what it puts, in any loop.

    It counts as one request of the engine: ``close`` waits for it. It begins with the first item
    that is asked for. Closing the iterator, or cancelling who waits for an item, cancels it.

    Args:
        engine: whose loop it is.
        work: called in the loop with SGLang's Engine and a function that takes each item.

    Raises:
        EngineFailed: the engine has failed, before or meanwhile.
        EngineClosed: the engine is closed.
        What ``work`` raises.
    """
    engine._check()
    return engine._async_chunks(_Work(engine._made, work))
