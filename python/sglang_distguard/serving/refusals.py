"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any, Optional

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from sglang_distguard.errors import (
    DistGuardError,
    EngineClosed,
    EngineFailed,
    NotSupported,
    StateInUse,
    UnknownEngine,
)

_INVALID = "invalid_request_error"
#: Error -> status, type and code.
_KINDS: tuple[tuple[type[BaseException], tuple[int, str, str]], ...] = (
    (UnknownEngine, (404, _INVALID, "model_not_found")),
    (EngineFailed, (503, "service_unavailable", "engine_failed")),
    (EngineClosed, (503, "service_unavailable", "engine_closed")),
    (StateInUse, (409, _INVALID, "in_use")),
    (NotSupported, (400, _INVALID, "not_supported")),
    (TimeoutError, (504, "server_error", "timeout")),
    (TypeError, (400, _INVALID, "invalid_value")),
    (ValueError, (400, _INVALID, "invalid_value")),
    (OSError, (400, _INVALID, "invalid_value")),
)


def body(message: str, *, kind: str, code: str, param: Optional[str] = None) -> dict[str, Any]:
    """The body of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(
    status: int, message: str, *, kind: str = _INVALID, code: str, param: Optional[str] = None
) -> JSONResponse:
    """A response that says why a request is refused."""
    return JSONResponse(body(message, kind=kind, code=code, param=param), status)


def of(error: BaseException) -> JSONResponse:
    """The response of one error."""
    status, kind, code = _kind(error)
    return refusal(status, _message(error), kind=kind, code=code, param=_param(error))


def body_of(error: BaseException) -> dict[str, Any]:
    """The same as an event of a stream whose status has been sent."""
    _, kind, code = _kind(error)
    return body(_message(error), kind=kind, code=code)


def _kind(error: BaseException) -> tuple[int, str, str]:
    if isinstance(error, UnknownEngine) and error.details.get("state") == "loading":
        return 503, "service_unavailable", "model_loading"
    for kind, found in _KINDS:
        if isinstance(error, kind):
            return found
    return 500, "server_error", "server_error"


def _message(error: BaseException) -> str:
    if isinstance(error, DistGuardError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _param(error: BaseException) -> Optional[str]:
    return "model" if isinstance(error, UnknownEngine) else None


async def on_error(_request: Request, error: Exception) -> JSONResponse:
    """For ``FastAPI.add_exception_handler``."""
    return of(error)


async def on_http_error(_request: Request, error: Exception) -> JSONResponse:
    """A route or method that does not exist."""
    assert isinstance(error, HTTPException)
    made = refusal(error.status_code, str(error.detail), code="not_found")
    made.headers.update(error.headers or {})
    return made


async def on_invalid(_request: Request, error: Exception) -> JSONResponse:
    """A body that is not what the route takes; 400 as in SGLang, naming each field."""
    assert isinstance(error, RequestValidationError)
    found = []
    for it in error.errors():
        place = ".".join(str(part) for part in it.get("loc", ()) if part != "body")
        found.append(f"{place}: {it.get('msg')}" if place else str(it.get("msg")))
    return refusal(400, "; ".join(found) or "invalid request", code="invalid_value")
