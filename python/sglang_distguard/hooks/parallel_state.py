"""sglang.srt.distributed.parallel_state: the world and the groups are made once and then shared."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Optional

from sglang_distguard import _core
from sglang_distguard.config import settings
from sglang_distguard.context import generation
from sglang_distguard.distributed import (
    coordinators,
    destroyed_groups,
    owned_groups,
    process_settings,
    world,
)
from sglang_distguard.distributed.coordinators import MODULE
from sglang_distguard.distributed.keys import GROUPS, WORLD, all_keys, key_in_use, own_key
from sglang_distguard.distributed.ranks import agreement, specs
from sglang_distguard.distributed.ranks.creation import creating
from sglang_distguard.distributed.ranks.creation import current as current_creation
from sglang_distguard.distributed.ranks.failures import describe
from sglang_distguard.distributed.ranks.log import open_ranks
from sglang_distguard.distributed.teardown import keeps_adopted, tearing_down
from sglang_distguard.errors import AgreementTimeout, DistGuardError, NotSupported
from sglang_distguard.patching import Around
from sglang_distguard.runner.collective_steps import may_overlap
from sglang_distguard.sync.single_flight import run_once

#: Read from the configuration (0.5.23, docstring of `initialize_model_parallel`).
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


def world_spec(call: dict[str, Any]) -> dict[str, Any]:
    """Return what two requests for a world must agree on; port, init method, timeout may differ."""
    world_size, rank = call["world_size"], call["rank"]
    local_rank = call["local_rank"]
    if call["distributed_init_method"] == "env://":
        world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size < 0 else world_size
        rank = int(os.environ.get("RANK", 0)) if rank < 0 else rank
        if local_rank == -1:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world_size == 1:
        # It says on which device its coordinators compute. Those of one rank compute nothing, and
        # their `device` is read only where tensors are copied from there (0.5.23: moe_wna16).
        local_rank = 0
    return {
        "world_size": world_size,
        "rank": rank,
        "local_rank": rank if local_rank == -1 else local_rank,
        "backend": str(call["backend"]),
    }


def adopted_world_spec(distributed: Any, requested: dict[str, Any]) -> dict[str, Any]:
    """Return the spec of a world that user code initialised; torch does not know the local rank."""
    return {
        **requested,
        "world_size": distributed.get_world_size(),
        "rank": distributed.get_rank(),
        "backend": str(distributed.get_backend()),
    }


def groups_spec(call: dict[str, Any]) -> dict[str, Any]:
    """Return what two requests for groups must agree on: all widths, flags and arguments."""
    return {**generation.current().widths(_WIDTHS), **coordinators.flags(), **call}


def _undo_world(
    namespace: dict[str, Any], *, default: Any, coordinator: Any, made: list[Any]
) -> None:
    """Destroy what was made since the arguments were read."""
    if coordinator is None and namespace["_WORLD"] is not None:
        namespace["_WORLD"].destroy()
        namespace["_WORLD"] = None
    coordinators.destroy_process_groups(keep=made)
    if default is None and coordinators.default_process_group() is not None:
        namespace["_MODEL_PARALLEL_GROUP_TIMEOUT"] = None
        namespace["torch"].distributed.destroy_process_group()


def _undo_groups(restore_stamps: Callable[[], None], *, made: list[Any], prefix: str) -> None:
    coordinators.destroy_and_unset(coordinators.read())
    coordinators.destroy_process_groups(keep=made, prefix=prefix)
    restore_stamps()


@contextmanager
def _deadline(world_size: int) -> Iterator[None]:
    """Do not wait 30 minutes, as torch would, for ranks that never arrive at the rendezvous."""
    if world_size == 1:
        yield
        return
    seconds = settings.current().agreement_timeout
    begun = time.monotonic()
    try:
        with creating(seconds):
            yield
    except (RuntimeError, TimeoutError) as error:
        if isinstance(error, DistGuardError) or time.monotonic() - begun < seconds * 0.9:
            raise
        raise AgreementTimeout(
            f"the world of {world_size} ranks was not initialised within {seconds:.1f} s "
            f"({describe(error)}). Check that all ranks are alive and were given the same address. "
            "agreement_timeout=... changes the deadline.",
            name="world",
            world_size=world_size,
            waited=seconds,
        ) from error


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
            # Read by the leader only. It must not undo what existed before it began.
            undoing.callback(
                _undo_world,
                namespace,
                default=coordinators.default_process_group(),
                coordinator=namespace["_WORLD"],
                made=coordinators.process_groups(),
            )
            if namespace["_WORLD"] is not None and not coordinators.is_alive(namespace["_WORLD"]):
                namespace["_WORLD"] = None  # left by a world that other code destroyed

            def make() -> Any:
                with _deadline(requested["world_size"]):
                    original(*args, **kwargs)
                return namespace["_WORLD"]

            return world.make(make)

        def adopt() -> tuple[Any, dict[str, Any]]:
            actual = adopted_world_spec(namespace["torch"].distributed, requested)
            # SGLang makes its own coordinator, unless this caller is about to be refused.
            return (
                initialise() if actual == requested else world.make(lambda: namespace["_WORLD"])
            ), actual

        refused = _core.resource(WORLD)
        if refused is not None and refused.coordinator is None:
            _core.forget(WORLD)  # the caller that adopted it was refused: adopt it completely
        run_once(
            WORLD,
            requested,
            observe=coordinators.world_identity,
            initialise=initialise,
            adopt=adopt,
            join=lambda _world: original(*args, **kwargs),  # stamps the world into this scope
            undo=undoing.close,
        )

    return init_distributed_environment


def _init_world_group(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let all ranks agree on the first collective of a world, so that a missing rank is named."""

    @functools.wraps(original)
    def init_world_group(*args: Any, **kwargs: Any) -> Any:
        ranks = None if agreement.has_turn() else open_ranks(coordinators.default_process_group())
        if ranks is None:
            return original(*args, **kwargs)
        with agreement.turn(ranks, "world", {"size": ranks.size}):
            return original(*args, **kwargs)

    return init_world_group


def _initialize_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)
    namespace = original.__globals__

    @functools.wraps(original)
    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        process_settings.agree()
        requested = groups_spec(dict(call.arguments))
        ranks = world.ranks()
        own = ranks is not None and settings.current().groups == "own"
        undoing = ExitStack()
        led = False

        def initialise() -> coordinators.Groups:
            nonlocal led
            creation = current_creation()
            undoing.callback(
                _undo_groups,
                generation.current().keep_stamps(),
                made=coordinators.process_groups(),
                prefix=(creation and creation.prefix) or "",
            )
            coordinators.forget_dead_names()
            if coordinators.identity(coordinators.read()) is None:
                coordinators.write(
                    dict.fromkeys(coordinators.FIELDS)
                )  # left by groups that other code destroyed
            made = {}
            if ranks is not None:
                made[coordinators.OWN_WORLD] = _own_world(namespace, call.arguments["backend"])
                generation.current().stamp({"world_group": made[coordinators.OWN_WORLD]})
            with creation.sharing_lone() if creation is not None else nullcontext():
                original(*args, **kwargs)
            led = True
            return {**coordinators.read(), **made}

        def adopt() -> tuple[coordinators.Groups, dict[str, Any]]:
            found = coordinators.find()
            return found, {**requested, **coordinators.widths(found)}

        scope = _core.current_scope()
        key = own_key(scope) if own else GROUPS

        def acquire() -> None:
            run_once(
                key,
                requested,
                observe=coordinators.own_identity if own else coordinators.shared_identity,
                initialise=initialise,
                adopt=adopt,
                join=coordinators.stamp,
                undo=undoing.close,
            )

        if ranks is None:
            acquire()
            return
        owned_groups.destroy_orphaned()
        if own:
            owned_groups.destroy_unless_leased(key, scope)  # left by a collected runner
        server_args = generation.current().published()
        _refuse_growing(server_args)
        if not may_overlap(key):
            _refuse_stages(requested["pp_size"])
        # The resulting widths, not the requested ones.
        spec = specs.model_spec(server_args) | specs.plain(requested)
        spec["groups"] = "own" if own else "share"

        def undo(_why: str) -> None:
            if led:  # it succeeded on this rank, and failed on another
                owned_groups.destroy_unless_leased(key, scope)

        # A caller that joins existing groups takes a turn too: all ranks must join with one runner.
        name = f"runner {specs.name_for(spec)}"
        with agreement.turn(ranks, name, spec, keep=True, undo=undo):
            acquire()

    return initialize_model_parallel


def _refuse_growing(server_args: Any) -> None:
    """Refuse elastic expert parallelism: a runner's own default group cannot grow.

    Elastic expert parallelism changes torch's default group (0.5.23).
    """
    backend = getattr(server_args, "elastic_ep_backend", None)
    if backend is not None:
        raise NotSupported(
            f"elastic_ep_backend={backend!r}: a world of several ranks that grows or shrinks while "
            "runners own groups of it is not supported. Leave it unset, or run one runner per "
            "process without sglang_distguard.",
            elastic_ep_backend=backend,
        )


def _refuse_stages(stages: int) -> None:
    """Refuse a pipeline whose steps take turns.

    Its stages call the same step one after the other, so no turn has all of them.
    """
    if stages > 1:
        raise NotSupported(
            f"pp_size={stages} with steps that take turns on all ranks "
            '(groups="share", GPUs, arm64 CPUs and CPUs with AMX) is not supported: a stage would '
            "wait in its turn for the stage before it. Use pp_size=1. On other CPUs, "
            'groups="own" supports pipelines.',
            pp_size=stages,
        )


def _own_world(namespace: dict[str, Any], backend: Optional[str]) -> Any:
    """Make one more coordinator of the whole world (0.5.23: memory and load barriers use it)."""
    shared = namespace["_WORLD"]
    coordinator = namespace["init_world_group"](
        ranks=list(range(shared.world_size)),
        local_rank=shared.local_rank,
        backend=backend or namespace["torch"].distributed.get_backend(shared.device_group),
    )
    return coordinators.mark_own(coordinator)


def _destroy_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy_model_parallel() -> None:
        with tearing_down(key_in_use(_core.current_scope())) as (state,):
            shared = state.resource
            if shared is not None:
                coordinators.write(
                    shared
                )  # the scope that tears down need not be the one that built
            if state.origin == "adopted":
                coordinators.write(dict.fromkeys(coordinators.FIELDS))
            # 0.5.23 forgets `_SELF_PP`: the next world would inherit a dead group.
            forgotten = {
                "_SELF_PP": coordinators.read()["_SELF_PP"],
                coordinators.OWN_WORLD: (shared or {}).get(coordinators.OWN_WORLD),
            }
            original()
            coordinators.destroy_and_unset(forgotten)

    return destroy_model_parallel


def _destroy_distributed_environment(original: Callable[..., Any]) -> Callable[..., Any]:
    namespace = original.__globals__

    @functools.wraps(original)
    def destroy_distributed_environment() -> None:
        # torch destroys all groups with the world
        with tearing_down(WORLD, *all_keys()) as (state, *_groups):
            if state.origin == "adopted":
                namespace["_WORLD"] = None
                return
            original()

    return destroy_distributed_environment


def _destroy(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def destroy(self: Any) -> None:
        keys = {
            key: None for part in coordinators.parts(self) for key in coordinators.keys_of(part)
        }
        if any(map(keeps_adopted, keys)):
            return
        with tearing_down(*keys):  # refused while runners hold it
            destroyed_groups.destroy(self, original)

    return destroy


def _cleanup_dist_env_and_memory(original: Callable[..., Any]) -> Callable[..., Any]:
    """Destroy all or nothing, even where SGLang destroys the groups and then fails (0.5.23)."""

    @functools.wraps(original)
    def cleanup_dist_env_and_memory(*args: Any, **kwargs: Any) -> None:
        with tearing_down(WORLD, *all_keys()):
            original(*args, **kwargs)

    return cleanup_dist_env_and_memory


CHANGES = (
    Around(MODULE, "init_world_group", _init_world_group),
    Around(MODULE, "init_distributed_environment", _init_distributed_environment),
    Around(MODULE, "initialize_model_parallel", _initialize_model_parallel),
    Around(MODULE, "destroy_model_parallel", _destroy_model_parallel),
    Around(MODULE, "destroy_distributed_environment", _destroy_distributed_environment),
    Around(MODULE, "GroupCoordinator.destroy", _destroy),
    Around(MODULE, "cleanup_dist_env_and_memory", _cleanup_dist_env_and_memory),
)
