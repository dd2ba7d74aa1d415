"""Each runner of several ranks uses its own communicators, or takes turns on shared ones."""

from __future__ import annotations

from typing import Any

import communicator_programs as programs
import pytest
from sglang_distguard.testing.ranks import RankError, RankRunner

NAMES = ["dense", "experts", "half", "mixture"]


def test_forwards_from_four_threads_in_opposite_order_are_those_of_each_runner_alone(
    repeated: Any, alone: Any
) -> None:
    for made in repeated(programs.forward_in_opposite_order, 2, names=NAMES, rounds=100):
        assert made == [{name: [alone(name, steps=1)] * 100 for name in NAMES}] * 2


def test_forwards_over_shared_groups_are_put_in_one_order(repeated: Any, alone: Any) -> None:
    for made in repeated(
        programs.forward_in_opposite_order, 2, names=NAMES, rounds=5, groups="share"
    ):
        assert made == [{name: [alone(name, steps=1)] * 5 for name in NAMES}] * 2


def test_forwards_over_shared_groups_in_no_order_are_wrong_or_fail(
    ranks: RankRunner, alone: Any
) -> None:
    """The reason for the two tests above: gloo mixes messages up, or notices unequal lengths."""
    unguarded = {"groups": "share", "unguarded": True}
    made, failure = None, ""
    try:
        made = ranks.run(
            programs.forward_in_opposite_order, 2, seconds=30, names=NAMES, rounds=20, **unguarded
        )
    except RankError as error:
        failure = str(error)
    assert made != [{name: [alone(name, steps=1)] * 20 for name in NAMES}] * 2
    assert made is not None or "gloo" in failure or ": hung" in failure


@pytest.mark.parametrize("step", ["forward of the draft", "sample", "weight update"])
def test_a_second_thread_over_a_draft_and_its_target_is_refused_and_neither_is_used_again(
    repeated: Any, alone: Any, step: str
) -> None:
    """Each rank refuses alone: another rank may have admitted the step and stay one step ahead."""
    expected = {name: alone(name) for name in ("experts", "dense")}
    for results in repeated(programs.draft_beside_target, 2, step=step):
        for it in results:
            assert it["made"] == expected
            assert it["refused"]["type"] == "StateInUse"
            assert "'experts' (thread first)" in it["refused"]["text"]
            assert not it["first"]
            assert [later["type"] for later in it["later"]] == ["LeaseBroken"] * 2
            assert it["after"] == {"half": alone("half")}


def test_a_timeout_in_line_for_a_turn_leaves_the_communicators_as_they_are(
    repeated: Any, alone: Any
) -> None:
    for results in repeated(programs.queue_behind_a_long_step, 2):
        for it in results:
            assert it["error"]["type"] == "AgreementTimeout"
            assert "has it" in it["error"]["text"]
            assert it["made"] == [alone("experts")]
            assert it["after"] == alone("dense")


def test_a_scope_is_not_reused_while_its_groups_are_being_destroyed(
    repeated: Any, alone: Any
) -> None:
    for results in repeated(programs.close_beside_a_build, 2):
        assert results == [{name: alone(name) for name in ("experts", "half")}] * 2


def test_ranks_still_agree_after_a_refused_world(ranks: RankRunner, alone: Any) -> None:
    for it in ranks.run(programs.build_after_a_refused_one, 2):
        assert it["error"] is not None
        assert it["made"] == {name: alone(name) for name in ("dense", "experts")}


@pytest.mark.parametrize("order", [["own", "share"], ["share", "own"]])
def test_a_runner_with_shared_groups_does_not_use_groups_that_another_owns(
    repeated: Any, alone: Any, order: list[str]
) -> None:
    expected = {"own": alone("dense"), "share": alone("experts")}
    for results in repeated(programs.build_with_own_and_shared_groups, 2, order=order):
        assert results == [{"made": expected, "groups": 2}] * 2


def test_runners_of_one_name_are_told_apart_over_shared_groups(repeated: Any, alone: Any) -> None:
    expected = [alone("dense"), alone("dense", seed=1)]
    for results in repeated(programs.forward_two_of_one_name, 2):
        for it in results:
            assert it["made"] == expected
            assert it["error"]["type"] == "AgreementTimeout"
            assert it["after"] == expected  # no rank had begun


def test_runners_without_names_are_told_apart_by_their_settings(repeated: Any, alone: Any) -> None:
    for results in repeated(programs.build_two_unnamed, 2):
        assert results == [[alone("dense"), alone("dense", seed=1)]] * 2


def test_a_stage_may_wait_longer_for_another_than_groups_may_take_to_be_created(
    ranks: RankRunner, alone: Any
) -> None:
    expected = alone("dense", tp_size=1, pp_size=2)
    results = ranks.run(programs.be_idle_in_a_pipeline, 2, deadline=10.0, pause=12.0)
    assert results == [expected] * 2


@pytest.mark.parametrize(
    ("policy", "overrides", "force", "text"),
    [
        ("share", {"tp_size": 1, "pp_size": 2}, {}, "pp_size=2 with steps that take turns"),
        ("own", {}, {"elastic_ep_backend": "mooncake"}, "elastic_ep_backend='mooncake'"),
    ],
)
def test_unsupported_settings_are_refused_on_all_ranks(
    ranks: RankRunner,
    alone: Any,
    policy: str,
    overrides: dict[str, Any],
    force: dict[str, Any],
    text: str,
) -> None:
    for it in ranks.run(programs.refuse, 2, policy=policy, overrides=overrides, force=force):
        assert it["error"]["type"] == "NotSupported"
        assert "NotImplementedError" in it["error"]["kinds"]
        assert text in it["error"]["text"]
        assert it["after"] == {"experts": alone("experts")}


@pytest.mark.parametrize("closed", [True, False])
def test_a_scope_that_was_left_takes_a_runner_of_other_widths(
    ranks: RankRunner, alone: Any, closed: bool
) -> None:
    wide, deep = alone("dense"), alone("dense", tp_size=1, pp_size=2)
    made = ranks.run(programs.build_in_other_layouts, 2, policy="own", closed=closed)
    assert made == [[wide, deep, wide]] * 2


@pytest.mark.parametrize("policy", ["own", "share"])
def test_a_forward_that_fails_on_one_rank_breaks_the_runners_over_its_communicators(
    repeated: Any, alone: Any, policy: str
) -> None:
    for results in repeated(programs.raise_in_a_forward, 2, policy=policy, on=1):
        assert results[1]["error"]["type"] == "OSError"
        assert results[0]["error"]["type"] == (
            "RankFailed" if policy == "share" else "RuntimeError"
        )
        for it in results:
            assert it["again"]["type"] == "LeaseBroken"
            assert "'dense'" in it["again"]["text"]
            if policy == "own":
                assert it["other"] is None
            else:
                assert it["other"]["type"] == "LeaseBroken"
                assert "by force, because " in it["other"]["text"]
            assert it["after"] == {"half": alone("half")}
        if policy == "share":
            assert "because OSError: " in results[1]["other"]["text"]


def test_a_forward_that_comes_late_to_a_failed_turn_is_not_computed_over_the_world(
    repeated: Any, alone: Any
) -> None:
    """The groups are destroyed by then; torch takes the None that SGLang leaves for the world's."""
    for results in repeated(programs.raise_in_a_forward, 2, policy="share", on=1, is_late=True):
        assert results[0]["error"]["type"] == "RankFailed"
        assert "LeaseBroken" in results[0]["error"]["cause"]
        assert results[1]["error"]["type"] == "OSError"
        for it in results:
            assert it["after"] == {"half": alone("half")}


def test_collectives_over_the_groups_of_a_closed_runner_are_refused(repeated: Any) -> None:
    for results in repeated(programs.use_destroyed_groups, 2):
        for it in results:
            assert {error["type"] for error in it["errors"].values()} == {"LeaseBroken"}
            assert it["number"] == 1.0


def test_steps_of_a_block_are_native_and_one_that_is_dropped_leaves_nothing_claimed(
    repeated: Any, alone: Any
) -> None:
    dense, experts = alone("dense"), alone("experts")
    for results in repeated(programs.steps_of_a_block, 2):
        for it in results:
            assert it["made"] == {"dense": dense, "experts": experts, "by another thread": dense}
            # The first step of another runner makes it one of the turn's.
            assert it["in python"] == {"dense": [], "experts": ["forward"]}
            assert it["is its own"]
