"""What changes a runner that has been built, as SGLang's Scheduler does it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sglang_distguard


def weights_of(folder: Path) -> list[tuple[str, Any]]:
    """(name, tensor) of a checkpoint that ``create_model`` made, as updates of weights take them."""
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").items())


def memory_of(runner: Any, *released: str, saves: bool) -> Any:
    """What SGLang's Scheduler releases and resumes memory with (0.5.23).

    Args:
        runner: built under the guard.
        *released: tags of what has been released already.
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
