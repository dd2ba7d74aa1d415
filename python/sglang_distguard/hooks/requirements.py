"""What SGLang and torch must have: without any one of these names nothing works.

Everything that the guard itself imports from SGLang, calls, or reads through an accessor is here,
and what every runner uses on every machine (tests/test_requirements.py). All other rows and hooks
are dropped where a release has nothing for them.
"""

from __future__ import annotations

from sglang_distguard.patching import Needs

_SRT = "sglang.srt."
_STATE = _SRT + "distributed.parallel_state"
_CONTEXT = _SRT + "runtime_context"
_RUNNER = "ModelRunner"
_C10D = "torch.distributed.distributed_c10d"

#: (module, names, what for)
_LINES: tuple[tuple[str, str, str], ...] = (
    (
        _CONTEXT,
        "_CONTEXT _PARALLEL RuntimeContext._server_args ParallelContext._stamp "
        "ParallelContext.override_permanently ParallelContext.clear_stamp",
        "hold the configuration of a runner, its widths and its groups",
    ),
    (
        _CONTEXT,
        "publish SpawnRanks snapshot_context restore_context",
        "give a runner its configuration, and take a failed one back",
    ),
    (
        _CONTEXT,
        "get_device get_exec get_flags get_parallel get_schedule",
        "answer what a configuration asks for",
    ),
    (_SRT + "server_args", "ServerArgs ServerArgs.resolve_once", "settings, resolved once"),
    (_SRT + "arg_groups.arg_utils", "field_names", "lists the settings that ranks compare"),
    (_SRT + "environ", "EnvField envs", "environment variables that a configuration writes"),
    (
        _STATE,
        "_WORLD _TP _PP _MODEL_PARALLEL_GROUP_TIMEOUT torch GroupCoordinator "
        "GroupCoordinator.destroy init_world_group init_distributed_environment "
        "initialize_model_parallel destroy_model_parallel destroy_distributed_environment",
        "make and destroy the world and the groups",
    ),
    (
        _SRT + "distributed.bootstrap",
        "init_parallel_runtime init_layer_runtime _PARALLEL_INITIALISED",
        "initialise the world, the groups and the layers' settings",
    ),
    (_SRT + "configs.model_config", "ModelConfig ModelConfig.from_server_args", "model settings"),
    (
        _SRT + "model_executor.model_runner",
        f"{_RUNNER} {_RUNNER}.__init__ {_RUNNER}.load_model {_RUNNER}.alloc_memory_pool "
        f"{_RUNNER}.init_attention_backends {_RUNNER}.init_cuda_graphs {_RUNNER}.forward "
        f"{_RUNNER}.sample",
        "the runner, and the steps that build and run it",
    ),
    (
        _SRT + "model_executor.cuda_graph_config",
        "Backend Phase check_cuda_graph_backend",
        "say whether a runner captures graphs",
    ),
    (_SRT + "model_executor.forward_context", "_current", "every forward sets it"),
    (
        _SRT + "model_executor.input_buffers",
        "_forward_input_buffer_pool",
        "input tensors of every forward",
    ),
    (_SRT + "model_loader.utils", "set_default_torch_dtype", "every weight load calls it"),
    (
        _SRT + "utils",
        "cpu_has_amx_support is_host_cpu_arm64",
        "say whether ranks reduce through memory of the whole process",
    ),
    (
        _SRT + "utils.common",
        "lru_cache_frozenset",
        "caches what was read from the files of a checkpoint",
    ),
    (_SRT + "layers.moe", "initialize_moe_config", "one of the steps before a runner"),
    (
        _SRT + "layers.quantization.fp4_utils",
        "initialize_fp4_gemm_config",
        "one of the steps before a runner",
    ),
    (
        _SRT + "layers.quantization.fp8_utils",
        "initialize_fp8_gemm_config",
        "one of the steps before a runner",
    ),
    (
        _SRT + "layers.quantization.unquant",
        "initialize_bf16_gemm_config",
        "one of the steps before a runner",
    ),
    (
        _SRT + "managers.scheduler",
        "Scheduler Scheduler.__init__ run_scheduler_process",
        "live in a scope",
    ),
    (
        _SRT + "managers.tokenizer_manager",
        "TokenizerManager TokenizerManager.__init__",
        "lives in a scope",
    ),
    (
        _SRT + "managers.detokenizer_manager",
        "DetokenizerManager DetokenizerManager.__init__ run_detokenizer_process",
        "live in a scope",
    ),
    (
        _SRT + "managers.mm_utils",
        "init_mm_embedding_cache",
        "makes the cache of what a model of images makes of them",
    ),
    (
        _SRT + "managers.io_struct",
        "AbortReq ShutdownReq sock_send",
        "end a request, and an event loop",
    ),
    ("sglang.utils", "TypeBasedDispatcher", "how a DetokenizerManager takes messages"),
    ("torch", "set_default_dtype get_default_dtype", "the dtype that a load sets"),
    (
        _C10D,
        "destroy_process_group _process_group_name _new_process_group_helper _get_default_group",
        "make and destroy process groups",
    ),
    ("threading", "Thread.start", "a thread belongs to the code that starts it"),
)

REQUIRED: tuple[Needs, ...] = tuple(
    Needs(module, name, why) for module, names, why in _LINES for name in names.split()
)
