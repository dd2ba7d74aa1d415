"""sglang.srt.model_loader: the files of weights for a GPU are registered once for all loads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from sglang_distguard.hooks import releases
from sglang_distguard.patching import Around
from sglang_distguard.patching.applied import MakeHook
from sglang_distguard.runner import pinned_loads
from sglang_distguard.sync.pacing import pause

#: Arguments that ask for another way of reading the files, which is then left to SGLang (0.5.23).
_OTHER_WAYS = ("disable_mmap", "prefetch", "drop_cache_after_load")
#: Seconds after each tensor, of which most of the time is a copy without the interpreter's lock.
_PAUSE = 0.003


def _get_all_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the load of a model: adapters and updates of weights are read as SGLang reads them."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _get_all_weights(*args: Any, **kwargs: Any) -> Iterator[Any]:
        weights = original(*args, **kwargs)
        device = None
        if releases.is_verified(releases.installed_version()):  # others' models may write into them
            device = pinned_loads.device_for(signature.bind(*args, **kwargs).arguments["model"])
        for weight in weights if device is None else pinned_loads.onto(device, weights):
            yield weight
            pause(_PAUSE)

    return _get_all_weights


def _iterator(*, sorts: bool) -> MakeHook:
    """Make the hook of an iterator over files; ``sorts``: whether it sorts the names of a file."""

    def make(original: Any) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def iterator(*args: Any, **kwargs: Any) -> Iterator[Any]:
            device = pinned_loads.loading_onto()
            given = signature.bind(*args, **kwargs).arguments
            if device is None or any(given.get(it) for it in _OTHER_WAYS):
                yield from original(*args, **kwargs)
                return
            files = list(given["hf_weights_files"])
            with _progress(original.__globals__, len(files)) as bar:
                yield from pinned_loads.weights_of(
                    files, device, sorts=sorts, after_each=bar.update
                )

        return iterator

    return make


def _progress(module: dict[str, Any], files: int) -> Any:
    """The bar that SGLang shows (0.5.23), from the names of its module."""
    import torch

    distributed = torch.distributed
    is_shown = not distributed.is_initialized() or distributed.get_rank() == 0
    return module["tqdm"](
        total=files,
        desc="Loading safetensors checkpoint shards",
        disable=not is_shown,
        bar_format=module["BAR_FORMAT"],
    )


_LOADER = "sglang.srt.model_loader.loader"
_FILES = "sglang.srt.model_loader.weight_utils"
CHANGES = (
    Around(_LOADER, "DefaultModelLoader._get_all_weights", _get_all_weights),
    Around(
        _FILES,
        "buffered_multi_thread_safetensors_weights_iterator",
        _iterator(sorts=True),
        uses=("tqdm", "BAR_FORMAT"),
    ),
    Around(
        _FILES, "safetensors_weights_iterator", _iterator(sorts=False), uses=("tqdm", "BAR_FORMAT")
    ),
)
