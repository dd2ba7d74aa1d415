"""Teardown of shared state: refused while held, forced on request, noticed when out-of-band."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard
import torch
from conftest import teardown_everything
from sglang_distguard import _core
from sglang_distguard.distributed import coordinators
from sglang_distguard.errors import DistGuardError, LeaseBroken, StateInUse
from sglang_distguard.testing import bit_equal, fleet, free_port, server_args, steps

Model = Callable[..., Path]


def slot(key: str) -> dict[str, Any]:
    return next(dict(it) for it in sglang_distguard.snapshot()["slots"] if it["key"] == key)


def build(model: Model, name: str, architecture: str = "gpt2") -> Any:
    return sglang_distguard.build_runner(server_args(model(architecture)), name=name)


def unhooked(name: str) -> Callable[..., Any]:
    """torch's own function, as code that bypasses the hooks would call it."""
    c10d = torch.distributed.distributed_c10d
    return vars(c10d)[f"_distguard_hook_{name}"].__wrapped__


def ways_to_destroy() -> dict[str, Callable[[], None]]:
    from sglang.srt.distributed import parallel_state

    shared = _core.resource("groups")
    return {
        "groups": parallel_state.destroy_model_parallel,
        "world": parallel_state.destroy_distributed_environment,
        "both": parallel_state.cleanup_dist_env_and_memory,
        "torch, default": torch.distributed.destroy_process_group,
        "torch, by name": lambda: torch.distributed.destroy_process_group(
            torch.distributed.group.WORLD
        ),
        "torch, a group in use": lambda: torch.distributed.destroy_process_group(
            shared["_TP"].cpu_group
        ),
        "torch, the coordinator of the world": lambda: torch.distributed.destroy_process_group(
            _core.resource("world").coordinator.cpu_group
        ),
        "a coordinator in use": shared["_TP"].destroy,
        "the coordinator of the world": _core.resource("world").coordinator.destroy,
        "teardown()": sglang_distguard.teardown,
    }


def test_every_way_to_destroy_what_a_runner_holds_is_refused_and_changes_nothing(
    guard: None, model: Model
) -> None:
    runner = build(model, "holder")
    known = list(torch.distributed.distributed_c10d._world.pg_map)
    for way, destroy in ways_to_destroy().items():
        with pytest.raises(StateInUse, match="'holder'") as caught:
            destroy()
        assert caught.value.details["holders"] == ["holder"], way
    assert list(torch.distributed.distributed_c10d._world.pg_map) == known
    assert {slot(key)["state"] for key in ("world", "groups")} == {"ready"}
    assert steps.generate(runner, steps=1, activate=sglang_distguard.activate).tokens
    sglang_distguard.close(runner)


def test_a_group_of_user_code_may_be_destroyed_while_runners_live(
    guard: None, model: Model
) -> None:
    runner = build(model, "holder")
    own = torch.distributed.new_group([0], backend="gloo")
    torch.distributed.destroy_process_group(own)
    assert slot("groups")["state"] == "ready"
    sglang_distguard.close(runner)


def test_a_forced_teardown_tells_the_holders_at_their_next_use(guard: None, model: Model) -> None:
    with sglang_distguard.runner_scope("first"):
        runner = build(model, "first")
    sglang_distguard.teardown(force=True)
    assert not torch.distributed.is_initialized()
    uses: list[Callable[[], Any]] = [
        lambda: steps.generate(runner, steps=1, activate=sglang_distguard.activate),
        lambda: runner.forward(None),  # type: ignore[arg-type]
        lambda: sglang_distguard.activate(runner).__enter__(),
    ]
    for use in uses:
        with pytest.raises(LeaseBroken, match="by force") as caught:
            use()
        assert caught.value.details["by"] == "thread MainThread"
    after = build(model, "second")
    with pytest.raises(LeaseBroken):  # it was built on the destroyed world, not the new one
        uses[0]()
    assert sglang_distguard.close(runner) is True
    (gpt2,) = fleet.members(Path(__file__).parent.parent / ".cache", [("gpt2", "float32")])
    result = steps.generate(after, activate=sglang_distguard.activate)
    assert bit_equal(result.logits, gpt2.alone.logits)
    sglang_distguard.close(after)


def test_a_teardown_that_is_refused_for_one_part_leaves_the_other(
    guard: None, model: Model
) -> None:
    from sglang.srt.distributed import parallel_state

    sglang_distguard.close(build(model, "gone"))
    handle = _core.RunnerHandle("holds the world", None, ["world"])
    # The closed runner released both leases; the handle leases only the world.
    with pytest.raises(StateInUse):
        sglang_distguard.teardown()
    for key in ("world", "groups"):
        assert slot(key)["state"] == "ready"
    assert parallel_state._TP is not None
    handle.close()
    sglang_distguard.teardown()
    assert {slot(key)["state"] for key in ("world", "groups")} == {"idle"}


def test_leaving_a_closing_block_releases_the_leases_also_on_an_error(
    guard: None, model: Model
) -> None:
    runner = build(model, "in a block")
    held: list[Any] = []

    def work() -> None:
        with sglang_distguard.closing(runner) as same:
            assert same is runner
            held.extend(slot("world")["holders"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert held != []
    assert slot("world")["holders"] == []
    assert sglang_distguard.close(runner) is False
    with pytest.raises(TypeError):
        sglang_distguard.closing(object()).__enter__()  # type: ignore[arg-type]


def test_after_a_teardown_another_world_is_adopted_and_never_destroyed(
    guard: None, model: Model
) -> None:
    from sglang.srt.distributed import parallel_state

    sglang_distguard.close(build(model, "on our own world"))
    sglang_distguard.teardown()
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1
    )
    theirs = torch.distributed.group.WORLD
    generation = slot("world")["generation"]
    runner = build(model, "on their world")
    assert slot("world")["origin"] == "adopted"
    assert slot("world")["generation"] == generation + 1
    (gpt2,) = fleet.members(Path(__file__).parent.parent / ".cache", [("gpt2", "float32")])
    result = steps.generate(runner, activate=sglang_distguard.activate)
    assert bit_equal(result.logits, gpt2.alone.logits)
    with pytest.raises(StateInUse):  # made by user code, but in use
        torch.distributed.destroy_process_group()
    sglang_distguard.close(runner)
    for let_go in (sglang_distguard.teardown, parallel_state.cleanup_dist_env_and_memory):
        let_go()
        assert torch.distributed.group.WORLD is theirs
        sglang_distguard.close(build(model, "on their world again"))
        assert slot("world")["origin"] == "adopted"
    sglang_distguard.teardown()
    torch.distributed.destroy_process_group()
    sglang_distguard.close(build(model, "on our own again"))
    assert slot("world")["origin"] == "created"


def test_a_world_that_does_not_match_is_refused_and_left_alone(guard: None, model: Model) -> None:
    store: Any = vars(torch.distributed)["HashStore"]()  # a re-export that type checkers do not see
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=4)
    try:
        with pytest.raises(DistGuardError, match="world_size"):
            build(model, "too small for this world")
        assert torch.distributed.get_world_size() == 4
    finally:
        torch.distributed.destroy_process_group()
        _core.reset(force=False)


def test_a_world_destroyed_out_of_band_is_reported_and_made_anew(
    guard: None, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    runner = build(model, "robbed")
    generation = slot("world")["generation"]
    unhooked("destroy_process_group")()
    with caplog.at_level(logging.WARNING, "sglang_distguard"):
        after = build(model, "next", "llama")
    assert "out-of-band" in caplog.text
    assert "'robbed'" in caplog.text
    assert slot("world")["generation"] == generation + 1
    assert {holder["name"] for holder in slot("world")["holders"]} == {"next"}
    with pytest.raises(LeaseBroken, match="outside"):
        steps.generate(runner, steps=1, activate=sglang_distguard.activate)
    (llama,) = fleet.members(Path(__file__).parent.parent / ".cache", [("llama", "float32")])
    result = steps.generate(after, activate=sglang_distguard.activate)
    assert bit_equal(result.logits, llama.alone.logits)
    sglang_distguard.close(runner)
    sglang_distguard.close(after)


def test_one_group_destroyed_out_of_band_is_noticed(guard: None, model: Model) -> None:
    sglang_distguard.close(build(model, "first"))
    generation = slot("groups")["generation"]
    unhooked("destroy_process_group")(_core.resource("groups")["_PP"].cpu_group)
    sglang_distguard.close(build(model, "second"))
    assert slot("groups")["generation"] == generation + 1


def test_a_swapped_group_is_reported_and_not_used(
    guard: None, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.distributed import parallel_state

    first = build(model, "first")
    generation = slot("groups")["generation"]
    stranger = parallel_state.GroupCoordinator.__new__(parallel_state.GroupCoordinator)
    vars(stranger).update(vars(parallel_state._TP))
    ours, parallel_state._TP = parallel_state._TP, stranger
    try:
        with caplog.at_level(logging.WARNING, "sglang_distguard"):
            second = build(model, "second")
        assert "out-of-band" in caplog.text
        assert slot("groups")["generation"] == generation + 1
        assert slot("groups")["origin"] == "adopted"  # user code made it, so user code destroys it
        with pytest.raises(LeaseBroken):
            steps.generate(first, steps=1, activate=sglang_distguard.activate)
        sglang_distguard.close(second)
    finally:
        parallel_state._TP = ours
        sglang_distguard.close(first)
        coordinators.destroy_and_unset(coordinators.find())


def test_a_scope_does_not_build_a_runner_on_state_torn_down_since_it_joined(
    guard: None, model: Model
) -> None:
    """The scope joined at one generation and constructs later: its groups are destroyed."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang_distguard.api import building as steps_of_build

    args = server_args(model("gpt2"))
    steps_of_build._initialise(args, 0, None)
    sglang_distguard.teardown()

    def construct() -> None:
        ModelRunner(
            model_config=ModelConfig.from_server_args(args),
            mem_fraction_static=0.5,
            gpu_id=0,
            nccl_port=0,
            server_args=args,
        )

    with pytest.raises(DistGuardError, match="world cannot be held: it is not initialised"):
        construct()
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(build(model, "another")))
    thread.start()
    thread.join()
    assert slot("groups")["generation"] > 0
    with pytest.raises(DistGuardError, match="rebuilt since it was joined"):
        construct()
    sglang_distguard.close(others[0])


def test_torchs_excepthooks_do_not_pile_up(guard: None, model: Model) -> None:
    import sys

    before = sys.excepthook
    for _ in range(3):
        sglang_distguard.close(build(model, "one of many"))
        assert sys.excepthook is not before
        teardown_everything()
        assert sys.excepthook is before


def test_teardown_without_the_guard_is_refused(sglang: None) -> None:
    with pytest.raises(DistGuardError, match="install"):
        sglang_distguard.teardown()


def test_closing_refuses_wrong_arguments_before_its_block_begins(runner: Any) -> None:
    wrong: list[dict[str, Any]] = [{"force": "no"}, {"timeout": 0}, {"timeout": "soon"}]
    for arguments in wrong:
        with (
            pytest.raises((TypeError, ValueError), match=next(iter(arguments))),
            sglang_distguard.closing(runner, **arguments),
        ):
            pytest.fail("the block began")
