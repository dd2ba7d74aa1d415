"""Changes to a built runner, as SGLang's Scheduler makes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang_distguard


def weights_of(folder: Path) -> list[tuple[str, Any]]:
    """(name, tensor) pairs of a ``create_model`` checkpoint, as weight updates take them."""
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").items())


def memory_of(runner: Any, *released: str, saves: bool) -> Any:
    """The object by which SGLang's Scheduler releases and resumes memory (0.5.23).

    Args:
        runner: built under the guard.
        *released: tags of memory that is already released.
        saves: whether the runner was built with ``enable_memory_saver``.
    """
    from sglang.srt.managers.scheduler_components import weight_updater
    from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

    with sglang_distguard.activate(runner):
        return weight_updater.SchedulerWeightUpdaterManager(
            tp_worker=SimpleNamespace(model_runner=runner),
            draft_worker=None,
            memory_saver_adapter=TorchMemorySaverAdapter.create(enable=saves),
            flush_cache=lambda **_: True,
            is_fully_idle=lambda **_: True,
            offload_tags=set(released),
        )
