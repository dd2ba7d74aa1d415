"""The main claim: eight runners built and run at once from eight threads, all correct."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sglang_distguard
from conftest import only_new_objects_collected, teardown_everything

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs
from sglang_distguard import _core
from sglang_distguard.testing import fleet, server_args, steps


@pytest.fixture(scope="module")
def eight(sglang: None, cache: Path) -> Iterator[tuple[list[fleet.Outcome], list[str]]]:
    """Eight runners, built by SGLang's own code from eight threads, and what a bystander saw."""
    members = fleet.members(cache)
    sglang_distguard.install()
    with only_new_objects_collected():
        with fleet.bystander() as seen:
            outcomes = fleet.build_all(members, build_named)
        yield outcomes, seen
        for outcome in outcomes:
            if outcome.runner is not None:
                sglang_distguard.close(outcome.runner)
                outcome.runner = None
        gc.collect()
    teardown_everything()
    sglang_distguard.uninstall()


def build_named(args: ServerArgs, name: str) -> ModelRunner:
    """Build by SGLang's own steps, with a name for events and errors."""
    with sglang_distguard.runner_scope(name):
        return steps.build(args)


Eight = tuple[list[fleet.Outcome], list[str]]


def test_all_eight_are_built_with_the_dtype_they_asked_for(eight: Eight) -> None:
    outcomes, _ = eight
    for outcome in outcomes:
        assert outcome.error is None, f"{outcome.member.name}: {outcome.error!r}"
        assert outcome.runner is not None
        assert fleet.parameter_dtypes(outcome.runner) == {outcome.member.dtype}


def test_a_bystander_sees_no_other_default_dtype_while_others_load(eight: Eight) -> None:
    _, seen = eight
    assert seen == []


def test_one_thread_leads_world_and_groups_and_seven_join(eight: Eight) -> None:
    outcomes, _ = eight
    built = {outcome.member.name for outcome in outcomes}
    events = [
        event
        for event in sglang_distguard.snapshot()["events"]
        if event["actor"]["runner"] in built
    ]
    for key in ("world", "groups"):
        decisions = [event["decision"] for event in events if event["key"] == key]
        assert decisions.count("publish") == 1
        assert decisions.count("lead") == 1
        assert decisions.count("join") == 7


def test_all_eight_use_one_world_and_one_set_of_groups(eight: Eight) -> None:
    outcomes, _ = eight
    assert fleet.sharing_problems(outcomes, sglang_distguard.activate) == []


def test_every_runner_holds_world_and_groups(eight: Eight) -> None:
    slots = {slot["key"]: slot for slot in sglang_distguard.snapshot()["slots"]}
    for key in ("world", "groups"):
        assert len(slots[key]["holders"]) == 8


def test_logits_of_all_eight_at_once_equal_those_of_each_alone_bit_for_bit(eight: Eight) -> None:
    outcomes, _ = eight
    with fleet.bystander() as seen:
        fleet.generate_all(outcomes, 5, sglang_distguard.activate)
    assert {o.member.name: o.problems for o in outcomes if o.problems} == {}
    assert seen == []


@pytest.mark.parametrize("index", [i for i, m in enumerate(fleet.MEMBERS) if m[1] == "float32"])
def test_float32_logits_are_hugging_faces(eight: Eight, index: int) -> None:
    outcomes, _ = eight
    assert fleet.error_to_huggingface(outcomes[index].member) < fleet.FLOAT32_TOLERANCE


def test_each_qwen3_moe_keeps_its_own_expert_metadata(eight: Eight) -> None:
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    outcomes, _ = eight
    found = []
    for outcome in outcomes:
        assert outcome.runner is not None
        with sglang_distguard.activate(outcome.runner):
            found.append((outcome.member.name, get_global_expert_location_metadata()))
    experts = [metadata for name, metadata in found if name.startswith("qwen3_moe")]
    assert all(metadata is not None for metadata in experts)
    assert experts[0] is not experts[1]
    dense = [metadata for name, metadata in found if name.startswith("gpt2")]
    assert dense == [None, None]


def test_a_runner_built_while_eight_serve_neither_stalls_nor_alters_them(
    eight: Eight, cache: Path
) -> None:
    outcomes, _ = eight
    newcomer = fleet.members(cache)[4]
    built = threading.Event()
    served_meanwhile: list[int] = []
    start = threading.Barrier(2)

    def build() -> None:
        start.wait()
        try:
            late.extend(fleet.build_all([newcomer]))
        finally:
            built.set()

    late: list[fleet.Outcome] = []
    builder = threading.Thread(target=build, name="newcomer")
    builder.start()
    start.wait()
    while True:
        finished = built.is_set()
        fleet.generate_all(outcomes, 1, sglang_distguard.activate)
        served_meanwhile.append(1)
        if finished:
            break
    builder.join()
    assert {o.member.name: o.problems for o in outcomes if o.problems} == {}
    assert len(served_meanwhile) > 1
    assert late[0].error is None
    fleet.generate_all(late, 2, sglang_distguard.activate)
    assert late[0].problems == []
    assert late[0].runner is not None
    sglang_distguard.close(late[0].runner)


def test_an_unequal_request_is_refused_at_once_and_changes_nothing(
    eight: Eight, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes, _ = eight
    member = outcomes[0].member
    # Without it SGLang itself refuses two ranks on a machine with one NUMA node.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    before = sglang_distguard.snapshot()["slots"]
    with pytest.raises(sglang_distguard.SpecMismatch) as caught:
        steps.build(server_args(member.model, tp_size=2))
    assert isinstance(caught.value, ValueError)
    assert caught.value.details["fields"]["world_size"] == {"existing": 1, "requested": 2}
    message = str(caught.value)
    assert "world_size" in message
    assert "existing 1, requested 2" in message
    assert member.name.split("-")[0] in message  # a holder, by name
    assert sglang_distguard.snapshot()["slots"] == before
    _core.adopt_execution(None)
    fleet.generate_all(outcomes, 1, sglang_distguard.activate)
    assert [o.problems for o in outcomes if o.problems] == []
