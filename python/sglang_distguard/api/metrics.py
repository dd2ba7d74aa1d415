"""``metrics``: what SGLang measures of one manager or runner, as text for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from sglang_distguard.context import metrics as of_scopes
from sglang_distguard.runner.handle import handle_of, handle_of_any

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.model_runner import ModelRunner


def metrics(
    resident: Union[ModelRunner, Scheduler, TokenizerManager, DetokenizerManager],
) -> str:
    """Return the metrics of a runner or manager, and of all others in its scope.

    SGLang makes them with ``enable_metrics=True``. Each scope has its own (docs/engines.md).

    Args:
        resident: a runner or manager that was built while the guard was installed.

    Returns:
        Prometheus's text format; empty where SGLang measures nothing, and after ``close``.

    Raises:
        TypeError: ``resident`` was not built under the guard.
    """
    handle = handle_of_any(resident)
    if handle is None:
        handle = handle_of(resident, "resident")
    return "" if handle.closed else of_scopes.text(of_scopes.families([handle.scope]))
