"""The releases of SGLang that are supported, and what only some of them have.

A release that is named here has a ledger, has passed the concurrent tests, and has a row in
docs/COMPATIBILITY.md. Any other release works when it has everything in ``requirements``; that it
was not verified is said once.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple, Optional

#: Verified releases, oldest first.
SUPPORTED = ("0.5.21", "0.5.22", "0.5.23")
#: How to get a release that the guard supports.
INSTALL = f"pip install sglang=={SUPPORTED[-1]}"


class Span(NamedTuple):
    """The releases that have a name: from ``first`` to ``last``; None is without end."""

    first: Optional[str] = None
    last: Optional[str] = None

    @property
    def is_limited(self) -> bool:
        """Whether a supported release may lack the name."""
        return self.first is not None or self.last is not None

    def has(self, release: Optional[str]) -> bool:
        """Whether ``release`` is one of them.

        A release that is newer than all known ones should have what the newest of them has, and
        so should one of unknown version (None).
        """
        return not (_before(release, self.first) or self.is_past(release))

    def is_past(self, release: Optional[str]) -> bool:
        """Whether all of them are earlier than ``release``."""
        return self.last is not None and (release is None or _before(self.last, release))

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first} and later" if self.first else "all"
        return f"{self.first} to {self.last}" if self.first else f"{self.last} and earlier"


#: Every release.
ALL = Span()
_SRT = "sglang.srt."
_LORA = "sglang.kernels.ops.lora.dense."
#: (module, names, releases), for names of rows and hooks that not every supported release has.
_LIMITED: tuple[tuple[str, str, Span], ...] = (
    (_SRT + "runtime_context", "create_context use_context", Span("0.5.22")),
    (_SRT + "layers.layer_boundary.factories", "_stack", Span("0.5.22")),
    (_SRT + "model_executor.runner_utils.forked_metadata_prep", "_pending_join", Span("0.5.23")),
    (_SRT + "model_executor.forward_batch_info", "_dp_tp_moe_masks_pad_rows", Span("0.5.22")),
    (
        _SRT + "model_executor.runner.decode_cuda_graph_runner",
        "_dp_tp_moe_masks_pad_rows",
        Span("0.5.22"),
    ),
    (_SRT + "arg_groups.muse_spark_hook", "get_config", Span("0.5.23")),
    (_SRT + "managers.overlap_utils", "_offered_relay", Span("0.5.23")),
    (
        _SRT + "layers.quantization.mxfp4_flashinfer_trtllm_moe",
        "_fused_finalize_all_reduce_world_size _fused_finalize_all_reduce_probed "
        "_fused_finalize_all_reduce_comm",
        Span(None, "0.5.21"),
    ),
    ("sglang.kernels.fused_op", "_platform", Span(None, "0.5.22")),
    (_SRT + "utils.common", "is_sail is_confidential_compute", Span("0.5.23")),
    (_SRT + "utils.common", "is_sm110_supported", Span("0.5.22")),
    (_SRT + "mem_cache.allocation", "ALLOC_FOR_DECODE_FUNCS", Span("0.5.22")),
    (
        _SRT + "mem_cache.unified_cache.components.base",
        "_COMPONENT_UUID_COUNTER",
        Span(None, "0.5.21"),
    ),
    (_SRT + "mem_cache.unified_cache.components.base", "_COMPONENT_UUID_COUNTERS", Span("0.5.22")),
    # 0.5.21 comes with torch 2.13.0 and transformers 5.12.1, the later ones with 2.14.1 and 5.19.0;
    # with flashinfer 0.6.18, and the later ones with 0.7.
    ("torch._opaque_base", "_FakeScriptObject_cls", Span(None, "0.5.21")),
    (
        "transformers.cache_utils",
        "DYNAMIC_LAYER_TYPE_MAPPING STATIC_LAYER_TYPE_MAPPING",
        Span("0.5.22"),
    ),
    ("flashinfer.utils", "_cache_buf_retired", Span("0.5.22")),
    (_SRT + "model_executor.runner_utils.forward_batch", "_current_batch", Span("0.5.22")),
    (_SRT + "model_executor.runner_utils.prefill_graph", "_current", Span("0.5.23")),
    # To 0.5.21 below kernels.ops.gemm.
    (_LORA + "chunked_sgmv_expand", "_chunked_lora_expand_kernel", Span("0.5.22")),
    (_LORA + "chunked_sgmv_shrink", "_chunked_lora_shrink_kernel", Span("0.5.22")),
    (_LORA + "lora_tuning_config", "get_lora_configs _logged_configs", Span("0.5.22")),
)
_SPANS = {(module, name): span for module, names, span in _LIMITED for name in names.split()}


def limited() -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that not every supported release has."""
    yield from _SPANS


def span_of(module: str, name: str) -> Span:
    """The releases that have ``module``.``name``, which a row or a hook is about."""
    return _SPANS.get((module, name), ALL)


def has(release: Optional[str], module: str, name: str) -> bool:
    """Whether ``release`` should have ``module``.``name``."""
    return span_of(module, name).has(release)


def installed_version() -> Optional[str]:
    """Return the version of the installed sglang distribution; None if there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def is_verified(release: Optional[str]) -> bool:
    """Whether ``release`` is one of the supported ones."""
    return release in SUPPORTED


def is_too_old(release: Optional[str]) -> bool:
    """Whether ``release`` is older than every supported one."""
    return _before(release, SUPPORTED[0])


def _before(one: Optional[str], other: Optional[str]) -> bool:
    """Whether version ``one`` is older than ``other``; False where one is None or no version."""
    from packaging.version import InvalidVersion, Version  # SGLang depends on it

    if one is None or other is None:
        return False
    try:
        return Version(one) < Version(other)
    except InvalidVersion:
        return False
