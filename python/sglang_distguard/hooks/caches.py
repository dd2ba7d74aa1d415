"""Process-wide caches whose results depend on the runner: each scope gets its own cache.

A scope's cache is dropped when another configuration is published there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_distguard._core import ScopedGlobal
from sglang_distguard.context import generation
from sglang_distguard.patching import Replace


class _PerConfigCache:
    """Replacement for a cached function, with one cache per scope and configuration."""

    def __init__(self, cached: Any, new: Callable[[Any], Any]) -> None:
        functools.update_wrapper(self, cached, updated=())
        self.__wrapped__ = cached.__wrapped__  # the uncached function, as in an lru_cache
        self.__replaced__ = cached  # see `Replace`
        self._new = new
        # (configuration, its cache). The default scope has such a pair too, because one runner may
        # follow another there.
        namespace = {"__name__": cached.__module__, cached.__name__: (None, cached)}
        self._entry = ScopedGlobal(namespace, cached.__name__, lambda: (None, None))
        self._published = generation.current().published

    def _own(self) -> Any:
        now = self._published()
        configuration, cache = self._entry.value
        if cache is None or configuration is not now:
            cache = self._new(self.__wrapped__)
            self._entry.value = (now, cache)
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Decode steps with graphs call one of these caches: no frames but this and `published`.
        configuration, cache = self._entry.value
        if cache is None or configuration is not self._published():
            cache = self._own()
        return cache(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)  # cache_info, cache_clear …


def _per_configuration(cached: Any) -> Any:
    if isinstance(cached, _PerConfigCache):
        return cached
    return _PerConfigCache(cached, functools.lru_cache(**cached.cache_parameters()))


def _files_per_configuration(cached: Any) -> Any:
    """As ``_per_configuration``, for SGLang's own decorator of the functions that read files."""
    from sglang.srt.utils.common import lru_cache_frozenset

    if isinstance(cached, _PerConfigCache):
        return cached
    return _PerConfigCache(cached, lru_cache_frozenset(maxsize=32))


_BATCH = "sglang.srt.model_executor.forward_batch_info"
_IMPORTS_IT = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
_MOE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
_FP8 = "sglang.kernels.ops.gemm.fp8_kernel"
_HF = "sglang.srt.utils.hf_transformers"
_MODEL = "sglang.srt.configs.model_config"
_MUSE = "sglang.srt.arg_groups.muse_spark_hook"
# 0.5.23. The first two functions read the configuration, the third whether torch.compile is active,
# the last two files of a checkpoint, which may be another one at the next build. Other caches read
# environment variables that no configuration writes, or belong to architectures that are not tested.
CHANGES = (
    Replace(_BATCH, "_dp_tp_moe_masks_pad_rows", _per_configuration),
    Replace(_IMPORTS_IT, "_dp_tp_moe_masks_pad_rows", _per_configuration),
    Replace(_MOE, "get_moe_configs", _per_configuration),
    Replace(_FP8, "get_w8a8_channelwise_fp8_configs", _per_configuration),
    *(
        Replace(module, "get_config", _files_per_configuration)
        for module in (f"{_HF}.config", _HF, f"{_HF}_utils", _MODEL, _MUSE)
    ),
    *(
        Replace(module, "get_generation_config", _files_per_configuration)
        for module in (f"{_HF}.common", _HF, f"{_HF}_utils", _MODEL)
    ),
)
