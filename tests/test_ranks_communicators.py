"""Whose communicators a runner of several ranks computes over, and that nobody else's collectives meet there."""

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
    """Why the two above are needed: gloo either mixes the messages up or notices their lengths."""
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


def test_a_draft_and_its_target_share_communicators_and_are_used_by_one_thread_at_a_time(
    repeated: Any, alone: Any
) -> None:
    expected = {name: alone(name) for name in ("experts", "dense")}
    for results in repeated(programs.draft_beside_target, 2):
        for it in results:
            assert it["made"] == expected
            assert [refused["type"] for refused in it["refused"]] == ["StateInUse"] * 3
            for refused in it["refused"]:
                assert "'experts' (thread first)" in refused["text"]
            assert it["again"] == list(expected.values())


@pytest.mark.parametrize("order", [["own", "share"], ["share", "own"]])
def test_a_runner_that_shares_does_not_take_what_another_owns(
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
            assert it["after"] == {"experts": alone("experts")}


def test_runners_without_names_are_told_apart_by_what_they_are(repeated: Any, alone: Any) -> None:
    for results in repeated(programs.build_two_unnamed, 2):
        assert results == [[alone("dense"), alone("dense", seed=1)]] * 2


def test_a_stage_may_wait_longer_for_another_than_groups_may_take_to_be_created(
    ranks: RankRunner, alone: Any
) -> None:
    expected = alone("dense", tp_size=1, pp_size=2)
    assert ranks.run(programs.be_idle_in_a_pipeline, 2, pause=4.0) == [expected] * 2


@pytest.mark.parametrize(
    ("policy", "overrides", "force", "text"),
    [
        ("share", {"tp_size": 1, "pp_size": 2}, {}, "pp_size=2 with steps that take turns"),
        ("own", {}, {"elastic_ep_backend": "mooncake"}, "elastic_ep_backend='mooncake'"),
    ],
)
def test_what_could_not_be_right_is_refused_on_all_ranks(
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


def test_a_scope_that_was_left_takes_a_runner_of_other_widths(
    ranks: RankRunner, alone: Any
) -> None:
    wide, deep = alone("dense"), alone("dense", tp_size=1, pp_size=2)
    made = ranks.run(programs.build_in_other_layouts, 2, policy="own")
    assert made == [[wide, deep, wide]] * 2


@pytest.mark.parametrize("policy", ["own", "share"])
def test_a_forward_that_one_rank_leaves_half_done_ends_what_used_its_communicators(
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
            assert it["after"] == {"half": alone("half")}
