"""Routes of the administrator: load, replace and unload models while others are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any, Optional

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from sglang_distguard.engines.pool import Pool
from sglang_distguard.serving import refusals
from sglang_distguard.serving.arguments import fields_of
from sglang_distguard.serving.keys import ADMINISTRATION

_DRAIN = 30.0


class Wanted(BaseModel):
    """What to load.

    Attributes:
        model_path: path of the checkpoint.
        set: further fields of ``ServerArgs``, and ``replicas``, which is ``Pool.load``'s.
        drain: seconds to wait for requests of the engine that is replaced.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    model_path: str
    set: dict[str, Any] = Field(default_factory=dict)
    drain: float = _DRAIN


class WantedAs(Wanted):
    """The same with the name of the model."""

    name: str


def router(pool: Pool, defaults: dict[str, Any], changes: Changes) -> APIRouter:
    """The routes; the middleware of keys lets administrators in only.

    Args:
        pool: whose engines they change.
        defaults: fields of ``ServerArgs`` for every model that is loaded.
        changes: the changes that run.
    """
    made = APIRouter(prefix=ADMINISTRATION)

    @made.get("/models", response_model=None)
    async def models() -> Response:
        return JSONResponse([_facts(pool, it.name) for it in pool.list()])

    @made.post("/models", response_model=None)
    async def load(wanted: WantedAs) -> Response:
        async def change() -> None:
            fields = fields_of(wanted.name, wanted.model_path, {**defaults, **wanted.set})
            await pool.aload(wanted.name, **fields)

        return await changes.make(change()) or JSONResponse(_facts(pool, wanted.name), 201)

    @made.put("/models/{name:path}", response_model=None)
    async def replace(name: str, wanted: Wanted) -> Response:
        async def change() -> None:
            fields = fields_of(name, wanted.model_path, {**defaults, **wanted.set})
            await pool.areplace(name, drain=wanted.drain, **fields)

        return await changes.make(change()) or JSONResponse(_facts(pool, name))

    @made.delete("/models/{name:path}", response_model=None)
    async def unload(name: str, drain: float = Query(_DRAIN)) -> Response:
        failed = await changes.make(pool.aclose(name, drain=drain))
        return failed or JSONResponse({"name": name, "state": "closed"})

    return made


class Changes:
    """Changes of the pool that run in one loop; each goes on when the client that asked has gone."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def make(self, change: Coroutine[Any, Any, Any]) -> Optional[Response]:
        """Make a change; return the refusal if it fails."""
        task = asyncio.ensure_future(_without_exit(change))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            await asyncio.shield(task)
        except Exception as error:
            return refusals.of(error)
        return None

    async def ended(self, seconds: float) -> bool:
        """Wait until no change is being made; return whether that is so in time."""
        running = list(self._running)
        if running:
            await asyncio.wait(running, timeout=seconds)
        return all(it.done() for it in running)


async def _without_exit(change: Coroutine[Any, Any, Any]) -> None:
    """SGLang ends a process whose settings it refuses; here that would end the server's loop."""
    try:
        await change
    except SystemExit as error:
        raise RuntimeError(f"SGLang has ended the load with exit status {error.code}") from error


def _facts(pool: Pool, name: str) -> dict[str, Any]:
    for it in pool.list():
        if it.name == name:
            facts = {"name": it.name, "state": it.state, "model": it.model, "pending": it.pending}
            if it.memory is not None:
                facts["memory"] = asdict(it.memory)
            if it.replicas:
                facts["replicas"] = [{"name": one.name, "state": one.state} for one in it.replicas]
            return facts
    return {"name": name, "state": "closed"}
