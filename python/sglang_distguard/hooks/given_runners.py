"""Functions that are given a runner, or a part of one, run in the scope of that runner.

The argument decides before any context. Batches are made outside of a runner's own methods, by
code that may be in no runner's scope or in another runner's. A test compares the rows with SGLang's
text.
"""

from __future__ import annotations

from sglang_distguard import _core
from sglang_distguard.patching import Within

_EXECUTOR = "sglang.srt.model_executor."
#: Functions with a parameter ``model_runner`` that code outside of runners calls (0.5.23).
GIVEN = (
    (
        _EXECUTOR + "forward_batch_info",
        "ForwardBatch.init_new ForwardBatch.compute_spec_mrope_positions "
        "ForwardBatch.prepare_mlp_sync_batch ForwardBatch.prepare_attn_tp_scatter_input",
    ),
    (_EXECUTOR + "graph_shared_output", "GraphSharedOutput.create_for_model_runner"),
    (
        _EXECUTOR + "model_runner_components.attention_backend_setup",
        "build_attention_backends get_attention_backend resolve_attention_backend_strs",
    ),
    (
        _EXECUTOR + "model_runner_components.cuda_graph_setup",
        "resolve_elastic_cuda_graph_config refresh_deep_gemm_layout_memory_budget "
        "recapture_elastic_cuda_graph capture_cuda_graphs finalize_cuda_graph_capture "
        "capture_prefill_graph capture_decode_graph",
    ),
    (_EXECUTOR + "model_runner_components.kv_pool_runtime", "compute_post_capture_kv_resize"),
    (_EXECUTOR + "cpu_graph_runner", "get_batch_sizes_to_capture"),
    (_EXECUTOR + "runner.base_cuda_graph_runner", "get_batch_sizes_to_capture"),
    ("sglang.srt.managers.scheduler_components.dp_attn", "prepare_mlp_sync_batch_raw"),
)
_BATCHES = "sglang.srt.managers.schedule_batch"
#: Methods of a batch that read the configuration, or call code that does (0.5.23).
_OF_BATCHES = (
    "prepare_for_extend prepare_for_decode mix_with_running check_decode_mem retract_decode "
    "new_tokens_required_next_decode mamba_lazy_prealloc_at_boundary mamba_lazy_spec_prepare "
    "maybe_evict_swa release_req"
)
#: Name of a batch's attribute and of a parameter: the request pool, which identifies its runner
#: (``hooks.model_runner``).
_POOL = "req_to_token_pool"

CHANGES = (
    *(
        Within(module, name, _core.StepOf(name.rpartition(".")[2], None), "model_runner")
        for module, names in GIVEN
        for name in names.split()
    ),
    Within(_BATCHES, "ScheduleBatch.init_new", _core.StepOf("init_new", None), _POOL),
    *(
        Within(_BATCHES, f"ScheduleBatch.{name}", _core.StepOf(name, None, runner=_POOL))
        for name in _OF_BATCHES.split()
    ),
)
