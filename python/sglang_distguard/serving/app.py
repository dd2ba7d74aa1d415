"""The application: routes over a pool, for a server of its own or mounted in another one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, Optional

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sglang.srt.entrypoints.openai.protocol import ModelCard, ModelList
from starlette.exceptions import HTTPException

from sglang_distguard.context import metrics
from sglang_distguard.engines.pool import Pool, Served
from sglang_distguard.errors import DistGuardError, EngineClosed, UnknownEngine
from sglang_distguard.process.installation import is_installed
from sglang_distguard.serving import administration, refusals
from sglang_distguard.serving.dispatch import Dispatch, one_of
from sglang_distguard.serving.handlers import KINDS, Kind
from sglang_distguard.serving.keys import Keys, check_key


def application(
    pool: Pool, api_key: Optional[str], admin_key: Optional[str], defaults: dict[str, Any]
) -> FastAPI:
    """As ``serving.application``."""
    check_key("api_key", api_key)
    check_key("admin_key", admin_key)
    if not is_installed():
        raise DistGuardError("a server needs the guard: call sglang_distguard.install() first")
    app = FastAPI(
        title="sglang_distguard",
        openapi_url=None if api_key else "/openapi.json",  # and with it /docs
    )
    app.add_middleware(Keys, api_key=api_key, admin_key=admin_key)
    app.add_exception_handler(DistGuardError, refusals.on_error)
    app.add_exception_handler(RequestValidationError, refusals.on_invalid)
    app.add_exception_handler(HTTPException, refusals.on_http_error)
    dispatch = Dispatch(pool)
    for kind in KINDS:
        app.add_api_route(kind.path, _route(dispatch, kind), methods=["POST"], response_model=None)
    _add_models(app, pool, dispatch)
    _add_health(app, pool)
    _add_metrics(app, pool)
    app.state.changes = administration.Changes()
    app.include_router(administration.router(pool, defaults, app.state.changes))
    return app


def _route(dispatch: Dispatch, kind: Kind) -> Callable[..., Awaitable[Response]]:
    async def answer(request: Request, asked: Any) -> Response:
        return await dispatch.answer(kind, asked, request)

    # FastAPI reads the type of the body here.
    answer.__annotations__ = {
        "request": Request,
        "asked": Annotated[kind.body, Body()],
        "return": Response,
    }
    answer.__name__ = kind.path.removeprefix("/v1/").replace("/", "_")
    return answer


def _add_models(app: FastAPI, pool: Pool, dispatch: Dispatch) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        found = []
        for name in pool:
            with suppress(UnknownEngine, AttributeError):  # closed since
                engine = pool[name]
                if engine.failure is None:
                    found.append(_card(engine))
        return ModelList(data=found)

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        return _card(dispatch.named(model))


def _card(found: Served) -> ModelCard:
    length = one_of(found).tokenizer_manager.model_config.context_len
    return ModelCard(id=found.name, root=found.name, max_model_len=length)


def _add_health(app: FastAPI, pool: Pool) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """200 unless a model has failed."""
        found = {it.name: {"state": it.state, "pending": it.pending} for it in pool.list()}
        has_failed = any(it["state"] == "failed" for it in found.values())
        status = "failed" if has_failed else "serving"
        return JSONResponse({"status": status, "models": found}, 503 if has_failed else 200)

    @app.get("/health/{model:path}", response_model=None)
    async def health_of(model: str) -> Response:
        """200 while the model serves; otherwise 503 with the cause, or 404."""
        for it in pool.list():
            if it.name == model:
                facts: dict[str, Any] = {"state": it.state, "pending": it.pending}
                if it.state == "failed":
                    with suppress(UnknownEngine):
                        failure = pool[model].failure
                        facts["cause"] = f"{type(failure).__name__}: {failure}"
                return JSONResponse(facts, 200 if it.state == "serving" else 503)
        raise UnknownEngine(
            f"The model {model!r} does not exist. Models: {', '.join(pool) or 'none'}",
            engine=model,
            known=list(pool),
        )


def _add_metrics(app: FastAPI, pool: Pool) -> None:
    @app.get("/metrics", response_model=None)
    async def all_metrics() -> Response:
        """SGLang's metrics of all engines, with the label ``model``."""
        found: list[Any] = []
        for name in pool:
            with suppress(UnknownEngine, EngineClosed):  # closed since
                found += pool[name].metric_families(model=name)
        text = metrics.text(metrics.together(found))
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)
