"""Changes to a built runner, as SGLang's Scheduler makes them."""

from __future__ import annotations

from dataclasses import fields
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
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

    kind: Any = weight_updater.SchedulerWeightUpdaterManager
    with sglang_distguard.activate(runner):
        # 0.5.22 and later read it themselves.
        is_given = any(it.init and it.name == "tp_cpu_group" for it in fields(kind))
        group = {"tp_cpu_group": get_parallel().tp_group.cpu_group} if is_given else {}
        return kind(
            **group,
            tp_worker=SimpleNamespace(model_runner=runner),
            draft_worker=None,
            memory_saver_adapter=TorchMemorySaverAdapter.create(enable=saves),
            flush_cache=lambda **_: True,
            is_fully_idle=lambda **_: True,
            offload_tags=set(released),
        )
