"""A server of OpenAI's routes over a pool of engines: SGLang's own serving classes, by model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sglang_distguard.engines.pool import Pool

__all__ = ["application"]


def application(
    pool: Pool,
    *,
    api_key: Optional[str] = None,
    admin_key: Optional[str] = None,
    defaults: Optional[Mapping[str, Any]] = None,
) -> FastAPI:
    """Return a FastAPI application that serves the engines of ``pool``, also those of later.

    Serve it by itself, or mount it in an application of your own
    (``mine.mount("/models", application(pool))``). It does not close the pool. docs/serving.md
    lists its routes.

    Args:
        pool: the engines; a request names one of them as its ``model``.
        api_key: clients must send it as a bearer token, except for health and metrics. None: no key
            is asked for.
        admin_key: bearer token of the routes that load, replace and unload. None: they are refused.
        defaults: fields of ``ServerArgs`` for every model that these routes load.

    Raises:
        TypeError, ValueError: a key is not a string of visible ASCII characters.
        DistGuardError: ``install()`` was not called.
    """
    # It imports SGLang, which a program may do later than this package.
    from sglang_distguard.serving import app

    return app.application(pool, api_key, admin_key, dict(defaults or {}))
