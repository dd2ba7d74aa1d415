"""Who may ask: bearer tokens, decided by SGLang's own rules (0.5.23 `srt.utils.auth`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from sglang.srt.utils.auth import AuthLevel, decide_request_auth
from starlette._utils import get_route_path  # by which the router finds the route, too
from starlette.datastructures import Headers

from sglang_distguard.config.checks import shown
from sglang_distguard.serving.refusals import refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

#: Beginning of the routes that need the administrator's key.
ADMINISTRATION = "/admin"


def check_key(name: str, key: object) -> Optional[str]:
    """Return ``key``; its message does not show it.

    Raises:
        TypeError, ValueError: it is neither None nor visible ASCII characters.
    """
    if key is None:
        return None
    if not isinstance(key, str):
        raise TypeError(f"{name} must be a string, not {shown(type(key))}")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{name} must be one or more visible ASCII characters, without spaces")
    return key


class Keys:
    """ASGI middleware: refuses requests before their body is read.

    SGLang's own looks at the whole path of the URL, so that an application that is mounted
    under ``/healthy`` would be open to clients without a key (0.5.23).
    """

    def __init__(self, app: ASGIApp, api_key: Optional[str], admin_key: Optional[str]) -> None:
        self._app = app
        self._api_key = api_key
        self._admin_key = admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = get_route_path(scope)
        is_admin = path == ADMINISTRATION or path.startswith(ADMINISTRATION + "/")
        given = Headers(scope=scope).get("authorization", "")
        decision = decide_request_auth(
            method=scope["method"],
            path=path,
            # Constant-time comparison is for ASCII only.
            authorization_header=given if given.isascii() else None,
            api_key=self._api_key,
            admin_api_key=self._admin_key,
            auth_level=AuthLevel.ADMIN_FORCE if is_admin else AuthLevel.NORMAL,
        )
        if decision.allowed:
            await self._app(scope, receive, send)
            return
        await _refused(decision.error_status_code, is_admin)(scope, receive, send)


def _refused(status: int, is_admin: bool) -> Any:
    if status == 403:
        return refusal(
            403,
            "the server was started without a key for administration (--admin-key), so these "
            "routes are off",
            kind="permission_error",
            code="administration_off",
        )
    whose = "the administrator's key" if is_admin else "the server's key"
    return refusal(
        status,
        f"send {whose} as 'Authorization: Bearer KEY'",
        kind="authentication_error",
        code="invalid_api_key",
    )
