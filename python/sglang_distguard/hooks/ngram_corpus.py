"""sglang.kernels.ops.speculative.ngram_corpus: its class is registered once, whichever thread comes first.

SGLang's `cache_once` (0.5.23) calls a function once in each of several threads that come at the same
moment. The second registration of the class with tvm_ffi is an error, so of two engines with NGRAM
that were opened at once only one came up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from sglang_distguard.config import settings
from sglang_distguard.errors import AcquireTimeout
from sglang_distguard.patching import Around

#: Attribute of the function: the future of what it makes, of the thread that came first.
_MADE = "_sglang_distguard_made"


def made_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let one thread make it, and all others wait for that; where it fails, the next one tries."""

    @functools.wraps(original)
    def make() -> Any:
        while True:
            mine: Future[Any] = Future()
            made = vars(original).setdefault(_MADE, mine)  # one step for all threads
            if made is mine:
                try:
                    mine.set_result(original())
                except BaseException:
                    vars(original).pop(_MADE, None)
                    mine.cancel()
                    raise
            if _is_ready(made, original.__name__):
                return made.result()

    return make


def _is_ready(made: Future[Any], what: str) -> bool:
    """Wait until it is made; False where the thread that made it has failed."""
    seconds = settings.current().timeout
    try:
        made.exception(None if math.isinf(seconds) else seconds)
    except TimeoutError:
        raise AcquireTimeout(
            f"another thread has not ended {what} within {seconds:g} s, which compiles and registers "
            "a class of SGLang once for the process. Set a larger timeout (runner_scope(timeout=...))",
            what=what,
            timeout=seconds,
        ) from None
    except CancelledError:
        return False
    return True


CHANGES = (
    Around("sglang.kernels.ops.speculative.ngram_corpus", "get_ngram_corpus_cls", made_once),
)
