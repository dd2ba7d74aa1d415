"""The treatment of each process-global of SGLang: the one table that hooks and documents read.

To treat another one, add a row. A scoped module global or class attribute needs nothing else. Names
and behaviour are those of sglang 0.5.23; ``releases`` says what not every supported release has.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Optional

from sglang_distguard.distributed.coordinators import FIELDS, FLAGS, PATCHED
from sglang_distguard.hooks import releases, unmanaged_globals


class How(StrEnum):
    """The four treatments (ARCHITECTURE.md), and a value for globals that need none."""

    SHARED = "shared"  # one per process, single-flight through the registry
    SCOPED = "scoped"  # every runner has its own
    THREAD_LOCAL = "thread-local"  # the calling thread has its own value
    EXCLUDED = "excluded"  # phases that may not overlap
    UNMANAGED = "unmanaged"  # equal for every runner, or a cache that only grows


@dataclass(frozen=True)
class Treatment:
    """One process-global, its treatment, and the reason for it.

    Attributes:
        module: module that has the global.
        name: name of the module global, or "Class.attribute" for a class attribute.
        how: the treatment.
        reason: why the global gets this treatment.
        by: module of ``sglang_distguard`` that implements it. Empty where every scope simply has
            its own value (``patching``), and where nothing is to be done.
    """

    module: str
    name: str
    how: How
    reason: str
    by: str = ""


def _rows(how: How, *lines: tuple[str, ...]) -> tuple[Treatment, ...]:
    """Return one row per name of ``(module, names, reason)`` or ``(module, names, reason, by)``."""
    return tuple(
        Treatment(line[0], name, how, *line[2:]) for line in lines for name in line[1].split()
    )


_SRT = "sglang.srt."
_STATE = _SRT + "distributed.parallel_state"
_EXECUTOR = _SRT + "model_executor."
_COMPILER = (
    "torch 2.14 keeps settings of this configuration per thread (torch.utils._config_module)"
)

TREATMENTS: tuple[Treatment, ...] = (
    *_rows(
        How.SHARED,
        (
            "torch.distributed",
            "default_process_group process_groups",
            "the world: torch allows only one; methods of a runner that owns its groups get the "
            "runner's own world",
            "hooks.process_groups",
        ),
        (
            "torch.distributed.distributed_c10d",
            "_backend _default_pg_init_method _group_count _pg_backend_config _pg_group_ranks "
            "_pg_map _pg_names _pg_to_tag _tags_to_pg _world",
            "torch's own lists of the world and its groups",
            "hooks.process_groups",
        ),
        (_STATE, "_WORLD", "coordinator of the world", "hooks.parallel_state"),
        (
            "sys",
            "excepthook",
            "torch installs one for each world; it is removed with the world",
            "distributed.world",
        ),
        (
            "torch",
            "float32_matmul_precision allow_tf32 cublas_allow_tf32 fp32_precision.cuda.matmul "
            "fp32_precision.mkldnn.matmul",
            "changed by enable_tf32_matmul; runners that live at once must agree on it",
            "distributed.process_settings",
        ),
        (
            _SRT + "batch_invariant_ops.batch_invariant_ops",
            "_batch_invariant_MODE _batch_invariant_LIB _original_torch_bmm",
            "changed by enable_deterministic_inference; runners that live at once must agree on it",
            "distributed.process_settings",
        ),
        (
            "torch",
            "bmm",
            "changed by enable_deterministic_inference; runners that live at once must agree on it",
            "distributed.process_settings",
        ),
        (
            _SRT + "distributed.device_communicators.custom_all_reduce_utils",
            "gpu_p2p_access_check",
            "depends on enable_p2p_check; runners that live at once must agree on it",
            "distributed.process_settings",
        ),
        (
            _SRT + "distributed.device_communicators.custom_all_reduce",
            "CustomAllreduce.__del__",
            "depends on enable_p2p_check; runners that live at once must agree on it",
            "distributed.process_settings",
        ),
        (
            "torch.multiprocessing.reductions",
            "reduce_tensor rebuild_cuda_tensor _reduce_tensor_original _rebuild_cuda_tensor_original",
            "replaced once for all runners, by the first one that is given tensors",
            "hooks.patch_torch",
        ),
        (
            _STATE,
            "_group_name_counter _groups",
            "names of groups; written only while a group is made, which is single-flight",
            "hooks.parallel_state",
        ),
        (
            _STATE,
            "_MODEL_PARALLEL_GROUP_TIMEOUT",
            "set with the world, read while groups are made",
            "hooks.parallel_state",
        ),
    ),
    *_rows(
        How.SCOPED,
        (_SRT + "runtime_context", "_PARALLEL _CONTEXT", "configuration, flags, resources"),
        (_SRT + "runtime_context", "_GLOBAL_DWDP_MANAGER", "weights of one model"),
        (
            _SRT + "environ",
            "envs.*",
            "environment variables that a configuration or a runner writes through envs and other "
            "code reads",
            "hooks.environ",
        ),
        (
            "os",
            "environ[self.name]",
            "as envs.*: the variable that a field of envs writes",
            "hooks.environ",
        ),
        (
            "prometheus_client.registry",
            "REGISTRY",
            "metrics of one manager or runner, and refused if another one has the same names",
            "hooks.metrics",
        ),
        (
            _STATE,
            " ".join(FIELDS),
            "the scope's own groups or the shared ones; a draft may patch in its own groups",
        ),
        (_STATE, " ".join(PATCHED), "true while a draft's groups replace the groups above"),
        (
            _STATE,
            " ".join(FLAGS),
            "written from one runner's configuration, read while its groups are made",
        ),
        (_SRT + "distributed.bootstrap", "_PARALLEL_INITIALISED", "run-once flag of one runner"),
        (_EXECUTOR + "forward_context", "_current", "the running forward's attention backend"),
        (
            _EXECUTOR + "input_buffers",
            "_forward_input_buffer_pool",
            "static input tensors: one pool would hand two runners the same memory",
        ),
        (
            _EXECUTOR + "graph_shared_output",
            "GraphSharedOutput._process_shared",
            "logits of captured graphs: one buffer would hand two runners the same memory",
        ),
        (
            _SRT + "layers.dp_attention",
            "_DpGatheredBufferWrapper._global_dp_buffer_len "
            "_DpGatheredBufferWrapper._local_dp_buffer_len "
            "_DpGatheredBufferWrapper._dp_max_padding "
            "_DpGatheredBufferWrapper._global_num_tokens "
            "_DpGatheredBufferWrapper._global_num_tokens_gpu",
            "sizes of the running forward's gathered batch",
        ),
        (
            _EXECUTOR + "forward_batch_info",
            "_dp_tp_moe_masks_pad_rows",
            "cached result that depends on one runner's widths",
            "hooks.caches",
        ),
        (
            _SRT + "layers.moe.moe_runner.triton_utils.fused_moe_triton_config",
            "get_moe_configs",
            "cached results that depend on deterministic inference",
            "hooks.caches",
        ),
        (
            "sglang.kernels.ops.gemm.fp8_kernel",
            "get_w8a8_channelwise_fp8_configs",
            "cached results that depend on torch.compile",
            "hooks.caches",
        ),
        (
            _SRT + "utils.hf_transformers.config",
            "get_config",
            "configuration files of checkpoints by path; the next checkpoint there may be another",
            "hooks.caches",
        ),
        (
            _SRT + "utils.hf_transformers.common",
            "get_generation_config",
            "configuration files of checkpoints by path; the next checkpoint there may be another",
            "hooks.caches",
        ),
        (
            _SRT + "managers.mm_schedule",
            "embedding_cache",
            "what one model made of images, by the images alone",
        ),
        (
            _SRT + "managers.mm_schedule",
            "host_offload_event",
            "ends one model's copies of images to the host; a copy back waits for no other model's",
        ),
        (
            _SRT + "mem_cache.radix_cache",
            "TreeNode.counter",
            "numbers of one tree's nodes; two threads that count together give a number twice",
        ),
        (
            _SRT + "mem_cache.unified_cache.unified_tree_core",
            "UnifiedTreeNode.counter",
            "numbers of one tree's nodes; two threads that count together give a number twice",
        ),
        (
            _SRT + "mem_cache.unified_cache.components.base",
            "_COMPONENT_UUID_COUNTER _COMPONENT_UUID_COUNTERS _LAST_ACCESS_TIME_COUNTER_FLOAT",
            "numbers of one tree's nodes; two threads that count together give a number twice",
        ),
        (
            _SRT + "managers.cache_controller",
            "CacheOperation.counter StorageOperation.counter",
            "numbers of one cache's operations; two threads that count together give a number twice",
        ),
        (
            _SRT + "managers.mm_utils",
            "_is_default_tensor_transport",
            "read from one scheduler's configuration",
        ),
        (
            _SRT + "managers.overlap_utils",
            "_offered_relay",
            "buffers that one runner's graphs read, for its own scheduler",
        ),
        (
            "sglang.kernels.ops.mamba.triton_ops.ssu_dispatch",
            "_mamba_ssu_backend",
            "made from one scheduler's configuration",
        ),
        (
            "sglang.kernels.fused_op",
            "_forced_backend",
            "read from an environment variable that a configuration may write",
        ),
        (
            _SRT + "model_loader.weight_utils",
            "_PREFETCH_BLOCK_SIZE",
            "read from an environment variable that a configuration may write",
        ),
        (_SRT + "utils.offloader", "_instance", "offloads one model's layers"),
        (_SRT + "distributed.naive_distributed", "_instance", "made for one runner's offloader"),
        (_SRT + "utils.host_shared_memory", "_instance", "made for one runner's offloader"),
        (_SRT + "utils.common", "cached_device_index", "the GPU of one runner"),
        (
            _SRT + "distributed.device_communicators.pynccl_allocator",
            "_graph_pool_id _active_symmetric_memory_context",
            "memory of one runner's graphs, and allocations of its running code",
        ),
        (
            _SRT + "layers.attention.flashinfer_backend",
            "global_override_indptr_cpu",
            "set while one runner plans a decode step",
        ),
        (
            "flashinfer.utils",
            "_cache_buf _cache_buf_retired",
            "scratch memory of kernels: those of two runners may run at once on two streams",
        ),
        (
            _EXECUTOR + "runner_utils.capture_mode",
            "is_capture_mode _capture_lora_variant _capture_attention_variant",
            "true while one runner captures a graph",
        ),
        (
            _EXECUTOR + "runner_backend_utils.tc_piecewise_cuda_graph.context_manager",
            "_in_tc_piecewise_cuda_graph _tc_piecewise_forward_context",
            "true while one runner captures or replays",
        ),
        (
            _EXECUTOR + "runner_backend_utils.breakable_cuda_graph.context",
            "_in_breakable_cuda_graph",
            "true while one runner captures or replays",
        ),
        (
            _EXECUTOR + "runner_utils.forked_metadata_prep",
            "_pending_join",
            "stream join of the running forward",
        ),
        (
            _EXECUTOR + "cpu_graph_runner",
            "_capture_skip_cross_attention",
            "true while one runner captures",
        ),
        (
            _SRT + "compilation.compile_phase",
            "_in_torch_compile_warmup _pcg_capture_stream",
            "true while one runner compiles or captures",
        ),
        (
            _SRT + "layers.layer_boundary.factories",
            "_stack",
            "layer stack of the model that is being built",
        ),
        (
            _SRT + "layers.layer_boundary.adapters.attention",
            "ATTN_TP_CONTEXT",
            "written by one model's constructor, read in its forwards",
        ),
        (
            _SRT + "layers.rotary_embedding.factory",
            "_ROPE_DICT",
            "cache of modules; each model must own its modules",
        ),
        (_SRT + "models.torch_native_llama", "tp_size tp_rank", "read from one runner's groups"),
        (
            _SRT + "models.transformers",
            "_TRANSFORMERS_MOE_LAYERS",
            "one model's layers by name; another's layer of that name would compute in its place",
        ),
        (_SRT + "layers.cp.base", "_STRATEGY", "made from one runner's configuration"),
        (
            _SRT + "layers.cp.cp_decode_attn_tp",
            "_global_cp_decode_attn_tp_ctx",
            "made from one runner's configuration",
        ),
        (
            _SRT + "layers.logits_processor",
            "_autotune_run_lm_head",
            "true while one runner autotunes",
        ),
        (
            _SRT + "layers.quantization.unquant",
            "_BF16_GEMM_BACKEND _enable_bf16_splitk_gemm",
            "read from one runner's configuration",
        ),
        (
            _SRT + "layers.quantization.fp8_utils",
            "FP8_GEMM_RUNNER_BACKEND",
            "read from one runner's configuration",
        ),
        (
            _SRT + "layers.quantization.fp4_utils",
            "FP4_GEMM_RUNNER_BACKEND",
            "read from one runner's configuration",
        ),
        (
            _SRT + "layers.quantization.mxfp4_flashinfer_trtllm_moe",
            "_fused_finalize_all_reduce_world_size _fused_finalize_all_reduce_probed "
            "_fused_finalize_all_reduce_comm",
            "made from one runner's tensor-parallel group",
        ),
        (
            _SRT + "layers.moe.moe_runner.triton_utils",
            "_config",
            "override of the MoE kernel configuration inside a with block",
        ),
    ),
    *_rows(
        How.THREAD_LOCAL,
        (
            "torch",
            "default_dtype",
            "SGLang keeps it set for the whole weight load",
            "hooks.torch_dtype",
        ),
        (
            "torch",
            "compiling",
            "true while one thread compiles; layers compute differently then",
            "hooks.torch_compiler",
        ),
        (
            "torch.nn",
            "Module.register_parameter",
            "replaced while a model is built from transformers' own code",
            "hooks.torch_module",
        ),
        (
            "torch._inductor.config",
            "max_autotune_gemm_backends freezing fx_graph_cache coordinate_descent_tuning "
            "combo_kernels benchmark_combo_kernel",
            _COMPILER,
        ),
        ("torch._inductor.config.triton", "unique_kernel_names", _COMPILER),
        (
            "torch._dynamo.config",
            "accumulated_cache_size_limit cache_size_limit suppress_errors",
            _COMPILER,
        ),
    ),
    *_rows(
        How.EXCLUDED,
        (
            _EXECUTOR + "runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph",
            "_hook_refcount _original_wait_stream",
            "counts the captures for which torch's Stream.wait_stream is replaced; nothing else "
            "computes during a capture",
            "hooks.graph_captures",
        ),
        (
            _SRT + "layers.activation",
            "_ACTIVATION_REGISTRY",
            "functions without weights that all models use; while graphs are captured, when "
            "nothing else computes, they are switched to code that torch.compile can trace",
            "hooks.model_runner",
        ),
    ),
    *_rows(How.UNMANAGED, *unmanaged_globals.LINES),
)

_BY_KEY = {(row.module, row.name): row for row in TREATMENTS}


def find(module: str, name: str) -> Optional[Treatment]:
    """Return the row of ``module``.``name``; None if there is none.

    A row named "name.*" is the row of every attribute of ``name`` that has no row of its own.
    """
    every = f"{name.partition('.')[0]}.*"
    return _BY_KEY.get((module, name)) or _BY_KEY.get((module, every))


def of_release(release: Optional[str]) -> list[Treatment]:
    """Return the rows of what ``release`` has; None is a release of unknown version."""
    return [row for row in TREATMENTS if releases.has(release, row.module, row.name)]


def scoped() -> dict[str, list[str]]:
    """Return module -> its globals and class attributes that are scoped without a hook."""
    found: dict[str, list[str]] = {}
    for row in TREATMENTS:
        if row.how is How.SCOPED and not row.by:
            found.setdefault(row.module, []).append(row.name)
    return found


def markdown() -> str:
    """Return the table of docs/process-globals.md; a test compares the two."""
    lines = ["| module | global | treatment | reason |", "|---|---|---|---|"]
    for row in TREATMENTS:
        span = releases.span_of(row.module, row.name)
        only = f" (sglang {span})" if span.is_limited else ""
        lines.append(f"| `{row.module}` | `{row.name}` | {row.how.value} | {row.reason}{only} |")
    return "\n".join(lines)
