"""sglang.srt.distributed.parallel_state: the world and the groups are made once and then shared."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from sglang_distguard import groups, world
from sglang_distguard.groups import GROUPS, MODULE, WORLD
from sglang_distguard.patching import Around, Needs
from sglang_distguard.scoping import accessor
from sglang_distguard.singleflight import run_once
from sglang_distguard.teardowns import tearing_down

#: Read from the ParallelContext (0.5.23, docstring of `initialize_model_parallel`).
_WIDTHS = (
    "tp_size",
    "pp_size",
    "attn_tp_size",
    "attn_dp_size",
    "attn_cp_size",
    "attn_dcp_size",
    "moe_ep_size",
    "moe_dp_size",
    "moe_tp_size",
    "shared_experts_tp_size",
)
_FLAGS = (
    "_ENABLE_CUSTOM_ALL_REDUCE",
    "_ENABLE_MSCCLPP",
    "_ENABLE_TORCH_SYMM_MEM_ALL_REDUCE",
    "_ENABLE_FLASHINFER_ALLREDUCE_ONLY",
)


def world_spec(call: dict[str, Any]) -> dict[str, Any]:
    """What two requests for a world must agree on. Port, init method and timeout may differ."""
    world_size, rank = call["world_size"], call["rank"]
    local_rank = call["local_rank"]
    if call["distributed_init_method"] == "env://":
        world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size < 0 else world_size
        rank = int(os.environ.get("RANK", 0)) if rank < 0 else rank
        if local_rank == -1:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return {
        "world_size": world_size,
        "rank": rank,
        "local_rank": rank if local_rank == -1 else local_rank,
        "backend": str(call["backend"]),
    }


def adopted_world_spec(distributed: Any, requested: dict[str, Any]) -> dict[str, Any]:
    """The spec of a world that somebody else initialised; torch does not know the local rank."""
    return {
        **requested,
        "world_size": distributed.get_world_size(),
        "rank": distributed.get_rank(),
        "backend": str(distributed.get_backend()),
    }


def groups_spec(call: dict[str, Any], parallel: Any) -> dict[str, Any]:
    """What two requests for groups must agree on: every width, and what is fixed with them."""
    widths = {width: getattr(parallel, width) for width in _WIDTHS}
    flags = {flag.strip("_").lower(): accessor(MODULE, flag).value for flag in _FLAGS}
    return {**widths, **flags, **call, **process_switches()}


def process_switches() -> dict[str, Any]:
    """Settings that SGLang applies to the whole process, so that runners must agree on them.

    0.5.23: `enable_batch_invariant_mode` replaces kernels in torch's dispatcher,
    `set_float32_matmul_precision("high")` is torch-wide; neither is ever undone.
    """
    from sglang.srt.runtime_context import get_exec

    execution = get_exec()
    return {
        "enable_deterministic_inference": execution.deterministic.enable_deterministic_inference,
        "enable_tf32_matmul": execution.features.enable_tf32_matmul,
    }


def _undo_world(
    namespace: dict[str, Any], *, default: Any, coordinator: Any, made: list[Any]
) -> None:
    """Destroy what was made since the arguments were looked at."""
    if coordinator is None and namespace["_WORLD"] is not None:
        namespace["_WORLD"].destroy()
        namespace["_WORLD"] = None
    groups.discard_process_groups(keep=made)
    if default is None and groups.default_process_group() is not None:
        namespace["_MODEL_PARALLEL_GROUP_TIMEOUT"] = None
        namespace["torch"].distributed.destroy_process_group()


def _undo_groups(parallel: Any, *, stamp: dict[str, Any], made: list[Any]) -> None:
    groups.discard(groups.read())
    groups.discard_process_groups(keep=made)
    parallel._stamp = stamp


def _init_distributed_environment(original: Callable[..., Any]) -> Callable[..., Any]:
    namespace = original.__globals__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init_distributed_environment(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        requested = world_spec(call.arguments)
        undoing = ExitStack()

        def initialise() -> world.World:
            # Looked at by the leader only: what there was before it began is not its to undo.
            undoing.callback(
                _undo_world,
                namespace,
                default=groups.default_process_group(),
                coordinator=namespace["_WORLD"],
                made=groups.process_groups(),
            )
            if namespace["_WORLD"] is not None and not groups.is_alive(namespace["_WORLD"]):
                namespace["_WORLD"] = None  # left by a world destroyed elsewhere

            def make() -> Any:
                original(*args, **kwargs)
                return namespace["_WORLD"]

            return world.make(make)

        def adopt() -> tuple[Any, dict[str, Any]]:
            actual = adopted_world_spec(namespace["torch"].distributed, requested)
            # SGLang's own coordinator of it, unless this caller is about to be refused.
            return (
                initialise() if actual == requested else world.make(lambda: namespace["_WORLD"])
            ), actual

        run_once(
            WORLD,
            requested,
            observe=groups.world_identity,
            initialise=initialise,
            adopt=adopt,
            join=lambda _world: original(*args, **kwargs),  # stamps the world into this scope
            undo=undoing.close,
        )

    return init_distributed_environment


def _initialize_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        parallel = accessor("sglang.srt.runtime_context", "_PARALLEL").value
        requested = groups_spec(dict(call.arguments), parallel)
        undoing = ExitStack()

        def initialise() -> groups.Groups:
            undoing.callback(
                _undo_groups, parallel, stamp=dict(parallel._stamp), made=groups.process_groups()
            )
            groups.forget_dead_names()
            if groups.identity(groups.read()) is None:
                groups.write(dict.fromkeys(groups.FIELDS))  # left by groups destroyed elsewhere
            original(*args, **kwargs)
            return groups.read()

        def adopt() -> tuple[groups.Groups, dict[str, Any]]:
            found = groups.find()
            return found, {**requested, **groups.widths(found)}

        run_once(
            GROUPS,
            requested,
            observe=groups.shared_identity,
            initialise=initialise,
            adopt=adopt,
            join=groups.stamp,
            undo=undoing.close,
        )

    return initialize_model_parallel


def _destroy_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        with tearing_down(GROUPS) as (state,):
            shared = state.resource
            if shared is not None:
                groups.write(shared)  # the scope that tears down need not be the one that built
            if state.origin == "adopted":
                groups.write(dict.fromkeys(groups.FIELDS))
            alone = groups.read()["_SELF_PP"]
            original()
            # 0.5.23 forgets `_SELF_PP`: the next world would inherit a dead group.
            groups.discard({**dict.fromkeys(groups.FIELDS), "_SELF_PP": alone})

    return destroy_model_parallel


def _destroy_distributed_environment(original: Callable[..., Any]) -> Callable[..., Any]:
    namespace = original.__globals__

    @functools.wraps(original)
    def destroy_distributed_environment() -> None:
        with tearing_down(GROUPS, WORLD) as (_groups, state):  # torch destroys all with the world
            if state.origin == "adopted":
                namespace["_WORLD"] = None
                return
            original()

    return destroy_distributed_environment


def _cleanup_dist_env_and_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """All or nothing, also where SGLang itself would destroy the groups and then fail (0.5.23)."""

    @functools.wraps(original)
    def cleanup_dist_env_and_memory(*args: Any, **kwargs: Any) -> None:
        with tearing_down(GROUPS, WORLD):
            original(*args, **kwargs)

    return cleanup_dist_env_and_memory


CHANGES = (
    Needs(MODULE, "GroupCoordinator"),
    Around(MODULE, "init_distributed_environment", _init_distributed_environment),
    Around(MODULE, "initialize_model_parallel", _initialize_model_parallel),
    Around(MODULE, "destroy_model_parallel", _destroy_model_parallel),
    Around(MODULE, "destroy_distributed_environment", _destroy_distributed_environment),
    Around(MODULE, "cleanup_dist_env_and_memory", _cleanup_dist_env_and_memory),
)
