"""Requests of a server to the engine that they name: SGLang's serving classes in its loop."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Union

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sglang.srt.utils.json_response import model_json_response

from sglang_distguard.engines import frontend
from sglang_distguard.engines.engine import Engine
from sglang_distguard.engines.pool import Pool, Served
from sglang_distguard.engines.replicas import Replicas
from sglang_distguard.errors import EngineClosed, UnknownEngine
from sglang_distguard.serving import refusals
from sglang_distguard.serving.handlers import Kind

#: The status of a request whose client has gone, who does not read it (nginx's log has this number).
_CLIENT_GONE = 499
_HANDLERS = "_distguard_handlers"


class Dispatch:
    """Finds the engine of a request and answers it there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def named(self, model: str) -> Served:
        """What has this name; ``NAME:ADAPTER`` is a LoRA adapter of NAME, as in SGLang.

        Raises:
            UnknownEngine: there is none; its details say whether it is loading.
        """
        for name in dict.fromkeys((model, model.partition(":")[0])):
            with suppress(UnknownEngine):
                return self._pool[name]
        known = self._pool.list()
        is_loading = any(it.name == model and it.state == "loading" for it in known)
        names = ", ".join(it.name for it in known if it.state == "serving") or "none"
        reason = "is still loading" if is_loading else "does not exist"
        raise UnknownEngine(
            f"The model {model!r} {reason}. Models that serve: {names}",
            engine=model,
            known=[it.name for it in known],
            state="loading" if is_loading else None,
        )

    async def answer(self, kind: Kind, asked: BaseModel, request: Request) -> Response:
        """Answer one request as the server of SGLang that has this model alone.

        Args:
            kind: which of SGLang's serving classes answers it.
            asked: the body.
            request: of the client. When it disconnects, the engine's request is aborted.

        Raises:
            UnknownEngine: no engine has the name.
            EngineFailed, EngineClosed: the engine has failed or is closed.
        """
        found = self.named(getattr(asked, "model", ""))
        while True:
            engine = one_of(found)
            work = functools.partial(_ask, kind, asked, _Client(request))
            try:
                return await _answered(frontend.items(engine, work), request)
            except EngineClosed:
                # It was replaced since: what has not been answered is for the new one.
                later = self.named(found.name)
                if later is found:
                    raise
                found = later


def one_of(found: Served) -> Engine:
    """The engine that gets the next request."""
    return found.serving() if isinstance(found, Replicas) else found


class _Client(Request):
    """The request as SGLang's classes see it, in another thread: without its connection."""

    def __init__(self, request: Request) -> None:
        super().__init__(dict(request.scope))

    async def is_disconnected(self) -> bool:
        """SGLang asks this every 4 s (0.5.23); here a client that goes cancels the request."""
        return False


async def _ask(
    kind: Kind, asked: BaseModel, client: _Client, made: Any, put: Callable[[Any], None]
) -> None:
    """In the engine's loop: put SGLang's response, and then the items of a stream."""
    handlers = vars(made).setdefault(_HANDLERS, {})  # they end with the engine
    if kind not in handlers:
        try:
            handlers[kind] = kind.handler(made)
        except ValueError as error:  # the model is not for this kind of request
            put(refusals.of(error))
            return
    response = await handlers[kind].handle_request(asked, client)
    put(response)
    if isinstance(response, StreamingResponse):
        # What SGLang would do in the background afterwards, `_async_chunks` does by cancelling.
        async for chunk in response.body_iterator:
            put(chunk)


async def _answered(items: AsyncIterator[Any], request: Request) -> Response:
    """The response, which is the first item, when it is there or the client has gone."""
    asking = asyncio.ensure_future(_next(items))
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((asking, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            return Response(status_code=_CLIENT_GONE)
        first = asking.result()
    finally:
        for task in (leaving, asking):
            task.cancel()
        await asyncio.wait((leaving, asking))
    if isinstance(first, StreamingResponse):
        headers = {k: v for k, v in first.headers.items() if k != "content-type"}
        return StreamingResponse(
            _rest(items), first.status_code, headers, media_type=first.media_type
        )
    async for _ in items:  # there is none; it is over when the engine's request is
        pass
    return _response(first)


def _response(answer: Any) -> Response:
    made = model_json_response(answer)
    if isinstance(made, Response):
        return made
    # Lists of models, of reranking.
    content = [it.model_dump(by_alias=True) if isinstance(it, BaseModel) else it for it in made]
    return Response(json.dumps(content), media_type="application/json")


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items)


async def _gone(request: Request) -> None:
    """Return when the client has disconnected; the request's body has been read."""
    receive: Callable[[], Awaitable[Any]] = request.receive
    while (await receive())["type"] != "http.disconnect":
        pass


async def _rest(items: Any) -> AsyncIterator[Union[str, bytes]]:
    """The items of a stream; an error is its last but one, as in SGLang's streams."""
    async with aclosing(items):
        try:
            async for chunk in items:
                yield chunk
        except Exception as error:
            yield f"data: {json.dumps(refusals.body_of(error))}\n\n"
            yield "data: [DONE]\n\n"
