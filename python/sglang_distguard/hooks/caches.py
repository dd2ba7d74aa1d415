"""Process-wide lru_caches whose results depend on the configuration: each scope gets its own cache.

A scope's cache is dropped when another configuration is published there.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang_distguard._core import ScopedGlobal
from sglang_distguard.context import generation
from sglang_distguard.patching import Replace


class _PerConfigCache:
    """Replacement for an ``lru_cache``, with one cache per scope and configuration."""

    def __init__(self, cached: Any) -> None:
        functools.update_wrapper(self, cached)
        self.__wrapped__ = cached.__wrapped__  # the uncached function, as in an lru_cache
        self._new = functools.lru_cache(**cached.cache_parameters())
        # (configuration, its cache). The default scope has such a pair too, because one runner may
        # follow another there.
        namespace = {"__name__": cached.__module__, cached.__name__: (None, cached)}
        self._entry = ScopedGlobal(namespace, cached.__name__, lambda: (None, None))

    @property
    def _own(self) -> Any:
        now = generation.current().published()
        configuration, cache = self._entry.value
        if cache is None or configuration is not now:
            cache = self._new(self.__wrapped__)
            self._entry.value = (now, cache)
        return cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)  # cache_info, cache_clear …


def _per_configuration(cached: Any) -> Any:
    return cached if isinstance(cached, _PerConfigCache) else _PerConfigCache(cached)


_BATCH = "sglang.srt.model_executor.forward_batch_info"
_IMPORTS_IT = "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
_MOE = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config"
_FP8 = "sglang.kernels.ops.gemm.fp8_kernel"
# 0.5.23. The first two functions read the configuration, the last whether torch.compile is active.
# Other caches read environment variables that no configuration writes, or belong to architectures
# that are not tested.
CHANGES = (
    Replace(_BATCH, "_dp_tp_moe_masks_pad_rows", _per_configuration),
    Replace(_IMPORTS_IT, "_dp_tp_moe_masks_pad_rows", _per_configuration),
    Replace(_MOE, "get_moe_configs", _per_configuration),
    Replace(_FP8, "get_w8a8_channelwise_fp8_configs", _per_configuration),
)
