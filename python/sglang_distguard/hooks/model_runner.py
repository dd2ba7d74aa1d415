"""sglang.srt.model_executor.model_runner: a runner's methods run in its scope, on any thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Optional

from sglang_distguard import _core
from sglang_distguard.context import generation
from sglang_distguard.context.current_device import device_of
from sglang_distguard.context.scopes import of_published, scope_active
from sglang_distguard.distributed.ranks import agreement
from sglang_distguard.errors import forget_frames
from sglang_distguard.patching import Around, AroundMethods, WithinMethods
from sglang_distguard.runner import budget, garbage, weights
from sglang_distguard.runner.collective_steps import agree_on_one_more, step_among_ranks
from sglang_distguard.runner.handle import (
    bind,
    find_handle,
    hold_experts,
    mark_as_of,
    release_failed,
)
from sglang_distguard.runner.import_errors import drop_tracebacks
from sglang_distguard.sync.phases import Phase

MODULE = "sglang.srt.model_executor.model_runner"


class Steps(NamedTuple):
    """Public methods of ModelRunner that are treated alike: their phase, or why they have none."""

    names: str
    #: rust/core/src/phases.rs says which phases overlap.
    phase: Optional[Phase] = None
    #: They compute together with the other ranks, so each has a turn (docs/COLLECTIVES.md).
    are_collective: bool = False
    why_in_no_phase: str = ""
    #: They read nothing that is scoped, so they have no hook.
    is_plain: bool = False


#: Every public method and property of ModelRunner, once (0.5.23).
TABLE = (
    Steps(
        "load_model alloc_memory_pool init_attention_backends post_capture_resize_kv_pool "
        "finalize_startup_weight_load check_weights",
        "load",
        are_collective=True,
    ),
    Steps(
        "start_startup_weight_load load_lora_adapter load_lora_adapter_from_tensors "
        "unload_lora_adapter",
        "load",
    ),
    Steps(
        "forward forward_split_prefill sample compute_logprobs_only prewarm_sampling",
        "forward",
        are_collective=True,
    ),
    Steps(
        "init_cuda_graphs init_decode_cuda_graph init_prefill_cuda_graph "
        "recapture_decode_cuda_graph ensure_decode_cuda_graphs",
        "capture",
        are_collective=True,
    ),
    Steps(
        "maybe_join_ep_ranks post_capture_elastic_ep_recover",
        are_collective=True,
        why_in_no_phase="work with elastic expert parallelism only, which is refused with several "
        "ranks; with one rank there is no other rank to join",
    ),
    Steps(
        "initialize init_startup_observability init_msprobe init_weight_updater "
        "init_spec_aux_hidden_state init_weight_exporter init_remote_instance_weight_transporter "
        "init_mindspore_runner init_memory_saver_adapter maybe_init_remote_instance_transfer_engine "
        "maybe_init_expert_location_metadata maybe_init_lplb_solvers maybe_init_eplb_manager "
        "maybe_init_elastic_ep init_token_oracle maybe_init_expert_backup_client "
        "maybe_apply_post_load_model_transforms maybe_init_lora_manager "
        "maybe_enable_batch_invariant_mode check_quantized_moe_compatibility init_torch_distributed "
        "maybe_precompile_model_kernels_after_loading maybe_init_dwdp init_lora_manager apply_torch_tp "
        "configure_kv_cache_dtype",
        why_in_no_phase="called by the constructor, which is in the load phase",
    ),
    Steps(
        "init_kv_cache_configurator init_kv_index_translator init_ngram_embedding_manager "
        "maybe_init_watermark_state maybe_init_hisparse_coordinator init_routed_experts_capturer "
        "init_indexer_capturer",
        why_in_no_phase="called by alloc_memory_pool, which is in the load phase",
    ),
    Steps(
        "supports_sampling_observer get_pp_proxy_dspark_hidden_size "
        "get_aux_hidden_states_width get_pp_proxy_topk_size get_pp_proxy_residual_num_blocks "
        "decode_num_tokens_per_req max_decode_logits_rows max_shared_logits_buffer_rows "
        "get_cuda_graph_layers update_decode_attn_backend prepare_dummy_forward_batch "
        "update_model_fields",
        why_in_no_phase="read or assign fields of the runner and of its configuration",
    ),
    Steps(
        "sampling_observer preloaded_weights_bytes account_preloaded_weights "
        "logical_max_total_num_tokens effective_logical_max_total_num_tokens "
        "effective_max_total_num_tokens max_token_pool_size attn_tp_sequence_sharded "
        "decode_graph_gather_requirements",
        is_plain=True,
        why_in_no_phase="read or assign fields of the runner alone, so that they have no hook",
    ),
)

_COLLECTIVE = frozenset(
    name for steps in TABLE if steps.are_collective for name in steps.names.split()
)
_PLAIN = frozenset(name for steps in TABLE if steps.is_plain for name in steps.names.split())
#: One thread at a time: attention metadata and static buffers hold one batch (0.5.23).
_EXCLUSIVE = "forward"
#: The action of `check_weights` that fills the weights with random numbers.
_RESETS = "reset_tensors"
_PHASES: dict[str, Phase] = {
    name: steps.phase for steps in TABLE if steps.phase is not None for name in steps.names.split()
}


def phase_of(step: str) -> Phase:
    """Return the phase of ``step``, a key of ``_PHASES``, for the current scope's runner."""
    phase = _PHASES[step]
    return phase if phase != "capture" or _captures() else "load"


def _captures() -> bool:
    """Whether the current scope's runner captures graphs."""
    return generation.current().captures_graphs()


def _step_of(name: str) -> Optional[_core.StepOf]:
    """Return the step in which method ``name`` runs; None if it reads nothing that is scoped."""
    if name in _PLAIN:
        return None
    phase = _PHASES.get(name)

    def otherwise(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[None]:
        return _in_python(handle, step)

    captures = phase == "capture"
    return _core.StepOf(
        name,
        None if captures else phase,
        exclusive=name == _EXCLUSIVE,
        otherwise=otherwise,
        always_otherwise=captures,
        in_turns=name in _COLLECTIVE and not captures,
    )


def _in_python(handle: _core.RunnerHandle, step: str) -> AbstractContextManager[None]:
    """Run a step that captures, or a step with several ranks."""
    phase = _PHASES.get(step)
    if phase == "capture":
        with scope_active(handle.scope):
            phase = phase_of(step)
    return step_among_ranks(
        handle,
        step,
        phase,
        is_collective=step in _COLLECTIVE,
        is_exclusive=step == _EXCLUSIVE,
    )


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if find_handle(self) is not None:  # a subclass calls its base constructor
            original(self, *args, **kwargs)
            return
        given = signature.bind_partial(self, *args, **kwargs).arguments
        server_args = given.get("server_args")
        with agreement.building(), of_published(server_args):
            agree_on_one_more(server_args)
            try:
                handle = bind(self, args, kwargs)
                device = device_of(given.get("gpu_id"))
                if device is not None:
                    handle.use_device(device)
                with step_among_ranks(handle, "construction", "load", is_collective=True):
                    original(self, *args, **kwargs)
                    hold_experts(handle)
            except BaseException as error:
                release_failed(self)
                forget_frames(error)
                raise
            drop_tracebacks()  # it may be dropped without `close`
            _core.note_build()

    return __init__


def _alloc_memory_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the request pool, by which batches find their runner (``hooks.given_runners``)."""
    step_of = _step_of("alloc_memory_pool")
    assert step_of is not None

    @functools.wraps(original)
    def alloc_memory_pool(self: Any, *args: Any, **kwargs: Any) -> Any:
        with step_of(self):
            with budget.pooling(self):
                result = original(self, *args, **kwargs)
            mark_as_of(self, getattr(self, "req_to_token_pool", None))
        return result

    return alloc_memory_pool


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runner that is built to share weights does so before its memory pool is sized."""
    step_of = _step_of("load_model")
    assert step_of is not None

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        with step_of(self):
            weights.refuse_if_shared(self, "load_model")
            weights.check_source(self)
            # It reports how much its weights took.
            with garbage.LOADS.one(), budget.sizing(self):
                result = original(self, *args, **kwargs)
            weights.share(self)
            budget.check_weights(self)
        return result

    return load_model


def _init_torch_distributed(original: Callable[..., Any]) -> Callable[..., Any]:
    """It measures the device before the model is loaded: the memory is promised then, or refused."""
    step_of = _step_of("init_torch_distributed")
    assert step_of is not None

    @functools.wraps(original)
    def init_torch_distributed(self: Any) -> None:
        with step_of(self):
            budget.measure(self, functools.partial(original, self))

    return init_torch_distributed


def _post_capture_resize_kv_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    step_of = _step_of("post_capture_resize_kv_pool")
    assert step_of is not None

    @functools.wraps(original)
    def post_capture_resize_kv_pool(self: Any, *args: Any, **kwargs: Any) -> Any:
        with step_of(self), budget.pooling(self):
            return original(self, *args, **kwargs)

    return post_capture_resize_kv_pool


def _check_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    step_of = _step_of("check_weights")
    assert step_of is not None

    @functools.wraps(original)
    def check_weights(self: Any, action: str, *args: Any, **kwargs: Any) -> Any:
        with step_of(self):
            if action == _RESETS:
                weights.refuse_if_shared(self, "check_weights")
            return original(self, action, *args, **kwargs)

    return check_weights


#: Methods that have a hook of their own.
_OWN_HOOKS = frozenset(
    {
        "alloc_memory_pool",
        "load_model",
        "check_weights",
        "init_torch_distributed",
        "post_capture_resize_kv_pool",
    }
)
CHANGES = (
    Around(MODULE, "ModelRunner.__init__", _init),
    Around(MODULE, "ModelRunner.alloc_memory_pool", _alloc_memory_pool),
    Around(MODULE, "ModelRunner.load_model", _load_model),
    Around(MODULE, "ModelRunner.init_torch_distributed", _init_torch_distributed),
    AroundMethods(
        MODULE,
        "ModelRunner",
        _post_capture_resize_kv_pool,
        only=frozenset({"post_capture_resize_kv_pool"}),
    ),
    AroundMethods(MODULE, "ModelRunner", _check_weights, only=frozenset({"check_weights"})),
    WithinMethods(
        MODULE,
        "ModelRunner",
        lambda name: None if name in _OWN_HOOKS else _step_of(name),
    ),
)
