"""How each process-global of SGLang is treated: the one list that hooks and documentation read.

Add a line to treat one more. Names and behaviour are those of sglang 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class How(StrEnum):
    """The four treatments (ARCHITECTURE.md), and leaving alone what does no harm."""

    SHARED = "shared"  # one per process, single-flight through the registry
    SCOPED = "scoped"  # every runner has its own
    THREAD_LOCAL = "thread-local"  # the calling thread has its own while it loads
    EXCLUDED = "excluded"  # phases that may not overlap
    HARMLESS = "harmless"  # the same for every runner, or only ever grows


@dataclass(frozen=True)
class Treatment:
    """One process-global: ``module``.``name`` and how it is treated, and why."""

    module: str
    name: str
    how: How
    reason: str


def _rows(how: How, *lines: tuple[str, str, str]) -> tuple[Treatment, ...]:
    return tuple(
        Treatment(module, name, how, reason)
        for module, names, reason in lines
        for name in names.split()
    )


_SRT = "sglang.srt."
_EXECUTOR = _SRT + "model_executor."

TREATMENTS: tuple[Treatment, ...] = (
    *_rows(
        How.SHARED,
        (
            "torch.distributed",
            "default_process_group",
            "the world: torch allows one; methods of a runner that owns its groups get its own world",
        ),
        (_SRT + "distributed.parallel_state", "_WORLD", "coordinator of the world"),
        (
            _SRT + "distributed.parallel_state",
            "_group_name_counter _groups",
            "names of groups; written only while a group is made, which is single-flight",
        ),
        (
            _SRT + "distributed.parallel_state",
            "_MODEL_PARALLEL_GROUP_TIMEOUT",
            "set with the world, read while groups are made",
        ),
    ),
    *_rows(
        How.SCOPED,
        (_SRT + "runtime_context", "_PARALLEL _CONTEXT", "configuration, flags, resources"),
        (_SRT + "runtime_context", "_GLOBAL_DWDP_MANAGER", "weights of one model"),
        (
            _SRT + "distributed.parallel_state",
            "_TP _ATTN_TP _SHARED_EXPERTS_TP _ATTN_CP _DCP _MOE_DP _MOE_EP _MOE_TP _PP _SELF_PP "
            "_PDMUX_PREFILL_TP_GROUP",
            "handles: the scope's own groups or the shared ones; a draft may patch its own",
        ),
        (
            _SRT + "distributed.parallel_state",
            "_TP_STATE_PATCHED _PP_STATE_PATCHED",
            "a draft's patch of the groups above",
        ),
        (
            _SRT + "distributed.parallel_state",
            "_ENABLE_CUSTOM_ALL_REDUCE _ENABLE_MSCCLPP _ENABLE_TORCH_SYMM_MEM_ALL_REDUCE "
            "_ENABLE_FLASHINFER_ALLREDUCE_ONLY",
            "written from one runner's configuration, read while its groups are made",
        ),
        (_SRT + "distributed.bootstrap", "_PARALLEL_INITIALISED", "run-once flag of one runner"),
        (_EXECUTOR + "forward_context", "_current", "the running forward's attention backend"),
        (
            _EXECUTOR + "input_buffers",
            "_forward_input_buffer_pool",
            "static input tensors: one pool would hand two runners the same memory",
        ),
        (_SRT + "utils.offloader", "_instance", "offloads one model's layers"),
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
        (_SRT + "layers.layer_boundary.factories", "_stack", "layer stack of the model in build"),
        (
            _SRT + "layers.layer_boundary.adapters.attention",
            "ATTN_TP_CONTEXT",
            "written by one model's constructor, read in its forwards",
        ),
        (_SRT + "layers.rotary_embedding.factory", "_ROPE_DICT", "modules: a model owns its own"),
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
            "from one runner's configuration",
        ),
        (
            _SRT + "layers.quantization.fp8_utils",
            "FP8_GEMM_RUNNER_BACKEND",
            "from one runner's configuration",
        ),
        (
            _SRT + "layers.quantization.fp4_utils",
            "FP4_GEMM_RUNNER_BACKEND",
            "from one runner's configuration",
        ),
        (
            _SRT + "layers.moe.moe_runner.triton_utils",
            "_config",
            "override of the MoE kernel configuration inside a with block",
        ),
    ),
    *_rows(
        How.THREAD_LOCAL,
        ("torch", "default_dtype", "SGLang holds it for the whole weight load"),
    ),
    *_rows(
        How.HARMLESS,
        (_SRT + "compilation.compilation_config", "SPLIT_OPS", "names of ops, appended at import"),
        (_SRT + "utils.invariants", "_REGISTRY", "names of checks, added at import"),
        (_SRT + "mem_cache.allocation", "ALLOC_FOR_DECODE_FUNCS", "one function per device"),
        (_SRT + "managers.io_struct", "_all_types _msgpack_decoder", "message types of plugins"),
        (
            "sglang.kernels.fused_op",
            "_forced_backend",
            "from an environment variable, resolved once",
        ),
        (
            _SRT + "distributed.device_communicators.custom_all_reduce_utils",
            "gpu_p2p_access_check",
            "replaced by a function that says yes unless enable_p2p_check is set",
        ),
        (
            _SRT + "observability.req_time_stats",
            "global_diff_realtime_monotonic",
            "offset of two clocks",
        ),
        (
            _SRT + "utils.common",
            "_allowed_media_domains _media_url_max_file_size_bytes",
            "limits of media downloads, not of a forward",
        ),
    ),
)


def scoped() -> dict[str, list[str]]:
    """Module -> names of its globals that every scope has its own value of."""
    found: dict[str, list[str]] = {}
    for row in TREATMENTS:
        if row.how is How.SCOPED:
            found.setdefault(row.module, []).append(row.name)
    return found


def markdown() -> str:
    """The table of ARCHITECTURE.md; a test keeps the two equal."""
    lines = ["| module | global | treatment | reason |", "|---|---|---|---|"]
    lines += [
        f"| `{row.module}` | `{row.name}` | {row.how.value} | {row.reason} |" for row in TREATMENTS
    ]
    return "\n".join(lines)
