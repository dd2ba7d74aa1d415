"""Rows of ``process_globals`` without treatment: equal for every runner, or caches that only grow.

``tests/test_unmanaged_globals.py`` shows that no logits depend on any of them.
"""

from __future__ import annotations

_SRT = "sglang.srt."
_MACHINE = "caches a hardware or installation property"
_KERNEL = "kernel cache keyed by its arguments"
_TOOLS = (
    "caches an installation property and variables of the environment that SGLang does not write"
)
_OPERATORS = "operators, which imports register, and caches of which kernel serves which tensors"
_REGISTERED = "SGLang's own models, registered by imports"
_CONTEXT = "a context variable: each thread has its own"
_FIELDS = "caches the fields of SGLang's own classes"
_CLASS = "value that transformers caches for a class"
_FOUND = "modules of transformers' models, imported when they are first asked for"

#: (module, names, reason)
LINES: tuple[tuple[str, str, str], ...] = (
    *(
        (
            module,
            "rng",
            "used to initialise weights, which the checkpoint replaces, and to sample with a "
            "temperature; samples, and weights missing in the checkpoint, are as random as with one "
            "runner",
        )
        for module in ("torch", "torch.cuda")
    ),
    (
        "random",
        "getstate _inst",
        "the first TpModelWorker seeds it; orders a queue of the policy `random`, picks ports and delays",
    ),
    *(
        (
            module,
            name,
            "the first TpModelWorker seeds it; makes the prompts of warm-ups and of profiles",
        )
        for module, name in (("numpy", "rng"), ("numpy.random.mtrand", "_rand"))
    ),
    *(
        (f"torch.{device}", "_lazy_seed_tracker", "seeds for a device that has not started")
        for device in ("cuda", "mtia", "xpu")
    ),
    ("psutil", "_LOWEST_PID", _MACHINE),
    (
        _SRT + "managers.schedule_policy",
        "_use_exact_chunk_fill",
        "caches a hardware property and an environment variable that SGLang does not write",
    ),
    (
        "threading",
        "threads:sglang.srt.utils.watchdog.WatchdogRaw._watchdog_thread",
        "one for each scheduler, which it watches; it computes nothing",
    ),
    (
        "torch",
        "grad_mode",
        "torch keeps it per thread; SGLang's code enters it by with statements and decorators",
    ),
    (
        "torch",
        "default_device",
        "torch keeps it per thread; SGLang's code enters it by with statements",
    ),
    (
        "torch",
        "sdp_priority_order",
        "torch puts cuDNN's attention first, once, where the GPU prefers it",
    ),
    (
        "torch",
        "operators",
        "numbers of operators and of their kernels, registered by imports and by torch.compile",
    ),
    ("torch", "get_device_module", "cache keyed by its arguments"),
    ("torch.library", "_defs _impls", _OPERATORS),
    ("torch._library.custom_ops", "OPDEFS OPDEF_TO_LIB", _OPERATORS),
    ("torch._library.simple_registry", "singleton", _OPERATORS),
    (_SRT + "utils", "sglang_lib", _OPERATORS),
    (_SRT + "utils.common", "sglang_lib", _OPERATORS),
    (
        "torch._jit_internal",
        "_overloaded_methods _overloaded_method_class_fileno",
        "what classes of timm declare for TorchScript when timm is imported",
    ),
    (
        "torch._opaque_base",
        "_FakeScriptObject_cls",
        "a class of torch 2.13, imported when it is first asked for",
    ),
    ("torch.nn.modules.module", "Module.___needs_generation_tag_patch", "a mark of Dynamo's"),
    (
        "transformers.models.auto.configuration_auto",
        "CONFIG_MAPPING",
        "modules of transformers' configurations, imported when they are first asked for",
    ),
    ("transformers.models.auto.modeling_auto", "AutoModel._model_mapping", _REGISTERED),
    ("transformers.models.auto.modeling_auto", "MODEL_MAPPING MODEL_MAPPING_NAMES", _REGISTERED),
    (
        "transformers.modeling_utils",
        "ALL_ATTENTION_FUNCTIONS",
        "SGLang's attention function, registered by an import; it is given the model's own layers",
    ),
    (
        "transformers",
        "ParakeetFeatureExtractor._backends",
        "names of the packages that a class needs, noted when it is first asked for",
    ),
    (
        "gc",
        "get_freeze_count",
        "set aside while a runner loads (runner/garbage.py), and by SGLang while it captures graphs",
    ),
    ("atexit", "callbacks", "number of functions that end threads and processes at exit"),
    ("logging", "_handlerList", "list of all handlers, to flush them at exit"),
    ("psutil", "_TOTAL_PHYMEM", _MACHINE),
    ("sys", "getrecursionlimit", "torch.compile raises it to 2000 and does not lower it"),
    ("sglang.kernels.jit.utils.arch", "_init_jit_cuda_arch_once is_arch_support_pdl", _MACHINE),
    (_SRT + "models.utils", "_has_cpu_fused_qk_norm", _MACHINE),
    (_SRT + "models.qwen3_moe", "_has_cpu_fused_qk_norm_rope", _MACHINE),
    ("logging", "flash_attn", "log level of another library"),
    ("threading", "threads:tqdm._monitor.TMonitor", "redraws progress bars"),
    (
        "threading",
        "threads:concurrent.futures.thread._worker",
        "threads of a pool that reads files or compiles; the pool outlives that work",
    ),
    (
        "sglang.kernels.ops.kvcache.cache_move",
        "copy_all_layer_kv_cache_cpu",
        "a function of sgl_kernel; where that is SGLang's stub, a mock that notes its calls",
    ),
    (
        _SRT + "speculative.eagle_info",
        "EagleDraftInput.ALLOC_LEN_PER_DECODE",
        "written by each draft worker; nothing in 0.5.23 reads it",
    ),
    (
        "concurrent.futures.thread",
        "_threads_queues",
        "the threads of all pools with their queues, to end them at exit",
    ),
    (
        _SRT + "sampling.custom_logit_processor",
        "_cache_from_str",
        "class cache keyed by the pickled text of the class",
    ),
    (
        "logging",
        "torch torch.__trace torch._dynamo torch.fx.experimental.recording "
        "torch.fx.experimental.sym_node torch.fx.experimental.symbolic_shapes",
        "loggers of torch.compile",
    ),
    ("sys", "path", "packages that torch.compile imports add their own folders"),
    (
        "os",
        "environ['_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR']",
        "address of a torch function, for code that Inductor compiles",
    ),
    (
        _SRT + "utils.common",
        "is_cuda_alike is_hpu is_sail is_sm110_supported is_gfx942_supported "
        "get_cpu_ids_by_node get_device is_confidential_compute",
        _MACHINE,
    ),
    (_SRT + "hardware_backend.mlx.runtime", "use_mlx", _MACHINE),
    (_SRT + "hardware_backend.npu.utils", "is_npu_arch35", _MACHINE),
    (_SRT + "layers.activation", "_jit_act_max_vec_bytes", _MACHINE),
    (_SRT + "layers.moe.moe_runner.triton_utils.fused_moe", "_moe_support_tma", _MACHINE),
    (_SRT + "mem_cache.storage.mmap.mmap_allocator", "_has_madv_populate_write", _MACHINE),
    ("sglang.kernels.ops.attention.decode_attention", "_NUM_CU", _MACHINE),
    ("os", "environ['FLASHINFER_CUDA_ARCH_LIST']", "names the GPU architecture of this machine"),
    ("os", "environ['TRITON_PTXAS_PATH']", "names the assembler that comes with torch"),
    ("pynvml", "nvmlLib _nvmlGetFunctionPointer_cache", _MACHINE),
    *(
        ("threading", f"threads:torch._inductor.compile_worker.{name}", "waits for compilations")
        for name in ("subproc_pool.SubprocPool._read_thread", "timer.Timer.check")
    ),
    (
        _SRT + "model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph",
        "_current_capture_var _current_stream_var _forked_streams_var",
        _CONTEXT,
    ),
    (_SRT + "model_executor.runner_utils.forward_batch", "_current_batch", _CONTEXT),
    (_SRT + "model_executor.runner_utils.prefill_graph", "_current", _CONTEXT),
    ("flashinfer.decode", "get_batch_decode_module", _KERNEL),
    ("flashinfer.norm", "get_norm_module", _KERNEL),
    ("flashinfer.prefill", "get_batch_prefill_module", _KERNEL),
    ("flashinfer.jit.cpp_ext", "get_cuda_path get_cuda_version", _MACHINE),
    ("flashinfer.utils", "device_support_pdl get_compute_capability", _MACHINE),
    (
        "jinja2.environment",
        "get_spontaneous_environment",
        "templates' settings, keyed by its arguments",
    ),
    (
        "torch",
        "num_threads",
        "a runner on a GPU sets it to 1 and computes nothing on the CPU with more threads",
    ),
    ("sglang.kernels.fused_op", "_oot_dispatch_key _platform _platform_key", _MACHINE),
    ("sglang.kernels.selector", "_platform", _MACHINE),
    ("sglang.kernels.jit.utils.arch", "_CUDA_ARCH", _MACHINE),
    (
        "sglang.kernels.jit.utils.compile.cache",
        "_digest_cache",
        "digests of installed files",
    ),
    (
        "sglang.kernels.jit.utils.compile.cache",
        "_anchor_roots _environment_fingerprint _target_tag",
        _TOOLS,
    ),
    (
        "sglang.kernels.jit.utils.compile.toolchain",
        "cuda_home device_compiler_path host_compiler_path toolkit_home",
        _TOOLS,
    ),
    ("sglang.kernels.ops.activation.activation", "activation_module", _KERNEL),
    ("sglang.kernels.ops.attention.clamp_position", "_jit_clamp_position_module", _KERNEL),
    ("sglang.kernels.ops.attention.rope", "_jit_fused_rope_module", _KERNEL),
    ("sglang.kernels.ops.gemm.gptq_marlin", "_jit_gptq_marlin_module", _KERNEL),
    (
        "sglang.kernels.ops.quantization.gptq_marlin_repack",
        "_jit_gptq_marlin_repack_module",
        _KERNEL,
    ),
    ("sglang.kernels.ops.kvcache.kvcache", "_jit_kvcache_module can_use_store_cache", _KERNEL),
    ("sglang.kernels.ops.layernorm.norm", "can_use_fused_inplace_qknorm", _KERNEL),
    ("sglang.kernels.selector", "_resolve", _KERNEL),
    ("sglang.kernels.ops.gemm", "_FP8_SCALED_MM", _KERNEL),
    (
        "sglang.kernels.ops.lora.dense.chunked_sgmv_expand",
        "_chunked_lora_expand_kernel",
        _KERNEL,
    ),
    (
        "sglang.kernels.ops.lora.dense.chunked_sgmv_shrink",
        "_chunked_lora_shrink_kernel",
        _KERNEL,
    ),
    ("sglang.kernels.ops.lora.dense.lora_tuning_config", "get_lora_configs", _KERNEL),
    (
        "sglang.kernels.ops.lora.dense.lora_tuning_config",
        "_logged_configs",
        "records that a log line was written",
    ),
    (
        "sglang.kernels.ops.moe.moe_fused_gate",
        "_DUMMY_I32",
        "one tensor per device that kernels are given and do not read",
    ),
    (
        _SRT + "arg_groups.arg_utils",
        "fallbacks_of field_names namespace_of resolvable_fields",
        _FIELDS,
    ),
    (_SRT + "runtime_context", "_parallel_config_leaves _parallel_fields", _FIELDS),
    (_SRT + "server_args", "_underscore_field_names", _FIELDS),
    (
        _SRT + "models.registry",
        "import_model_classes",
        "caches the model classes of SGLang's own modules",
    ),
    (
        "sglang.kernels.ops.attention.clamp_position",
        "_CLAMP_POSITION",
        "caches which kernel serves which device and dtype",
    ),
    (
        _SRT + "layers.moe.fused_moe_triton.layer",
        "_deferred_finalize_info_logged",
        "records that a log line was written",
    ),
    (
        _SRT + "models.deepseek_common.attention_backend_handler",
        "AttentionBackendRegistry._handlers",
        "one function per attention backend, added at import",
    ),
    (
        _SRT + "models.sarvam_moe",
        "AttentionBackendRegistry._handlers",
        "one function per attention backend, added at import",
    ),
    (
        _SRT + "models.gemma3_causal",
        "Gemma3ForCausalLM._can_set_experts_implementation_cached_value "
        "EmbeddingGemmaModel._can_set_experts_implementation_cached_value",
        _CLASS,
    ),
    (
        _SRT + "models.gemma3_mm",
        "Gemma3ForConditionalGeneration._can_set_experts_implementation_cached_value",
        _CLASS,
    ),
    (
        "transformers.models.qwen2_audio.modeling_qwen2_audio",
        "Qwen2AudioEncoder._can_set_experts_implementation_cached_value",
        _CLASS,
    ),
    (
        "transformers.modeling_utils",
        "_CAN_RECORD_REGISTRY",
        "what models of a class can record, by the class",
    ),
    (
        "transformers.models.auto.modeling_auto",
        "AutoModelForCausalLM._model_mapping "
        "MODEL_FOR_CAUSAL_LM_MAPPING MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        _FOUND,
    ),
    (_SRT + "utils.hf_transformers.config", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", _FOUND),
    (
        "transformers.utils",
        "is_flash_attn_2_available",
        "caches an installation property; where flash_attn has no version 2, SGLang replaces it with "
        "a function that says so, the same for every runner",
    ),
    *(
        (
            _SRT + module,
            names,
            "compiled functions; torch.compile notes of its last compilation whether a break of "
            "the graph is an error, and reads it, under its own lock",
        )
        for module, names in (
            ("layers.attention.vision", "ROTARY_EMBED_CLASSES"),
            ("layers.rotary_embedding.utils", "apply_rotary_pos_emb apply_rotary_pos_emb_native"),
        )
    ),
    (
        "transformers.cache_utils",
        "DYNAMIC_LAYER_TYPE_MAPPING STATIC_LAYER_TYPE_MAPPING",
        "transformers' classes of caches, registered by imports",
    ),
    (
        _SRT + "managers.schedule_batch",
        "sanity_check_mm_pad_shift_value",
        "caches that a size of a vocabulary was checked",
    ),
    (
        _SRT + "layers.attention.vision",
        "VisionSdpaAttention._generate_mask_cache",
        "masks by the lengths of images, which nothing writes after they are made",
    ),
    (_SRT + "utils.common", "print_info_once", "records that a log line was written"),
    (
        _SRT + "models.llava",
        "LlavaForConditionalGeneration._config_cls_name_to_arch_name_mapping",
        "names of transformers' classes, by the model that asks; it keeps the last models in memory",
    ),
    (
        _SRT + "models.transformers",
        "TransformersBase.hf_to_sglang_mapper",
        "names of weights of each subclass, created with the subclass",
    ),
    (_SRT + "compilation.compilation_config", "SPLIT_OPS", "names of ops, appended at import"),
    (_SRT + "utils.invariants", "_REGISTRY", "names of checks, added at import"),
    (_SRT + "mem_cache.allocation", "ALLOC_FOR_DECODE_FUNCS", "one function per device"),
    *(
        (_SRT + module, "ALLOC_MEMORY_FUNCS", "one function per device")
        for module in (
            "mem_cache.memory_pool_host",
            *(
                f"mem_cache.pool_host.{name}"
                for name in ("common", "mamba", "mha", "mla", "unified")
            ),
            "state_capturer.base",
        )
    ),
    (_SRT + "managers.io_struct", "_all_types _msgpack_decoder", "message types of plugins"),
    (
        _SRT + "observability.req_time_stats",
        "global_diff_realtime_monotonic",
        "offset between two clocks",
    ),
    (
        _SRT + "utils.common",
        "show_time_cost",
        "enables time measurements that no code of 0.5.23 makes",
    ),
    (
        "torch.distributed.distributed_c10d._world",
        "pg_group_ranks",
        "ranks of a group for weight updates; torch refuses a second group of the same name",
    ),
    (
        _SRT + "utils.common",
        "_allowed_media_domains _media_url_max_file_size_bytes",
        "limits of media downloads, from the last configuration that sets any; unused in forwards",
    ),
)
