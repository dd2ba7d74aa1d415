"""sglang.srt.configs.model_config: a ModelConfig refers to the ServerArgs it was made from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Optional

from sglang_distguard.context.scopes import of_published
from sglang_distguard.patching import Around
from sglang_distguard.sync.pacing import pause

MODULE = "sglang.srt.configs.model_config"
_MADE_FROM = "_sglang_distguard_made_from"


class _MadeFrom:
    """Reference to ``ServerArgs`` that copies lose: a copy may be made for another runner."""

    def __init__(self, server_args: Any) -> None:
        self.server_args = server_args

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # processes without the guard unpickle it too


def made_from(model_config: Any) -> Optional[Any]:
    """Return the ServerArgs from which ``from_server_args`` made ``model_config``, else None."""
    known = getattr(model_config, "__dict__", {}).get(_MADE_FROM)
    return known.server_args if isinstance(known, _MadeFrom) else None


def _from_server_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_server_args(server_args: Any, *args: Any, **kwargs: Any) -> Any:
        pause()
        with of_published(server_args):
            model_config = original(server_args, *args, **kwargs)
        vars(model_config)[_MADE_FROM] = _MadeFrom(server_args)
        return model_config

    return from_server_args


CHANGES = (Around(MODULE, "ModelConfig.from_server_args", _from_server_args),)
