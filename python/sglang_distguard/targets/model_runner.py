"""sglang.srt.model_executor.model_runner: a runner's methods run in its own scope, on any thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from sglang_distguard import rooms, runners
from sglang_distguard.patching import AroundMethods
from sglang_distguard.ranks import agreement

MODULE = "sglang.srt.model_executor.model_runner"


class Steps(NamedTuple):
    """Public methods of ModelRunner that are alike to others: in a room, or in none and why."""

    names: str
    #: rust/core/src/rooms.rs says which of them overlap.
    room: Optional[rooms.Room] = None
    #: Compute together with the other ranks, so in their turn (docs/COLLECTIVES.md).
    are_collective: bool = False
    why_in_no_room: str = ""


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
        why_in_no_room="work with elastic expert parallelism only, which is refused with several ranks "
        "and has nobody to join with one",
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
        why_in_no_room="called by the constructor, which is in the room for loads",
    ),
    Steps(
        "init_kv_cache_configurator init_kv_index_translator init_ngram_embedding_manager "
        "maybe_init_watermark_state maybe_init_hisparse_coordinator init_routed_experts_capturer "
        "init_indexer_capturer",
        why_in_no_room="called by alloc_memory_pool, which is in the room for loads",
    ),
    Steps(
        "sampling_observer supports_sampling_observer get_pp_proxy_dspark_hidden_size "
        "get_aux_hidden_states_width get_pp_proxy_topk_size get_pp_proxy_residual_num_blocks "
        "decode_num_tokens_per_req decode_graph_gather_requirements max_decode_logits_rows "
        "preloaded_weights_bytes account_preloaded_weights max_shared_logits_buffer_rows "
        "logical_max_total_num_tokens effective_logical_max_total_num_tokens "
        "effective_max_total_num_tokens max_token_pool_size get_cuda_graph_layers "
        "update_decode_attn_backend prepare_dummy_forward_batch attn_tp_sequence_sharded "
        "update_model_fields",
        why_in_no_room="read or assign fields of the runner and of its configuration",
    ),
)

_COLLECTIVE = frozenset(
    name for steps in TABLE if steps.are_collective for name in steps.names.split()
)
_ROOMS: dict[str, rooms.Room] = {
    name: steps.room for steps in TABLE if steps.room is not None for name in steps.names.split()
}


def room_of(step: str) -> rooms.Room:
    """Which room a step of ``_ROOMS`` of the current scope's runner is in."""
    room = _ROOMS[step]
    return room if room != "capture" or _captures() else "load"


def _captures() -> bool:
    """Whether the current scope's runner captures graphs (0.5.23: `cuda_graph_setup`)."""
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.runtime_context import get_device, get_flags

    if get_device().device == "cpu":
        return get_flags().capture.enable_torch_compile
    phases = (Phase.PREFILL, Phase.DECODE)
    return not all(check_cuda_graph_backend(phase, Backend.DISABLED) for phase in phases)


def _method(original: Callable[..., Any]) -> Callable[..., Any]:
    if original.__name__ in _ROOMS:
        original = _in_room(original)
    if original.__name__ in _COLLECTIVE:
        original = _in_order(original)
    if original.__name__ == "forward":
        original = _one_thread_at_a_time(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        token = handle.enter()
        try:
            return original(self, *args, **kwargs)
        finally:
            runners.leave(token)

    return method


def _in_order(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        with runners.in_order(handle, step):
            return original(self, *args, **kwargs)

    return method


def _in_room(original: Callable[..., Any]) -> Callable[..., Any]:
    step = original.__name__

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        room = room_of(step)
        if room == "capture":
            runners.refuse_capture_without_turns(handle)
        with rooms.room(room, handle.name):
            return original(self, *args, **kwargs)

    return method


def _one_thread_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = runners.find_handle(self)
        if handle is None:
            return original(self, *args, **kwargs)
        with runners.one_thread_at_a_time(handle):
            return original(self, *args, **kwargs)

    return forward


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if runners.find_handle(self) is not None:  # a subclass calling up
            original(self, *args, **kwargs)
            return
        with agreement.building():
            call = signature.bind_partial(self, *args, **kwargs).arguments
            runners.agree_on_one_more(call.get("server_args"))
            handle = runners.bind(self, args, kwargs)
            token = handle.enter()
            try:
                with runners.in_order(handle, "construction"), rooms.room("load", handle.name):
                    original(self, *args, **kwargs)
                runners.hold_experts(handle)
            except BaseException:
                runners.give_up(handle)
                raise
            finally:
                runners.leave(token)

    return __init__


CHANGES = (AroundMethods(MODULE, "ModelRunner", make=_method, make_init=_init),)
