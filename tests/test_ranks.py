"""Builds and forwards of several ranks with real SGLang: right, or refused on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import rank_programs as programs
from conftest import TIMES
from sglang_distguard.testing.ranks import RankRunner

NAMES = list(programs.RUNNERS)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_builds_in_different_order_on_two_ranks_all_succeed_and_are_right(
    repeated: Any, alone: Any, seed: int
) -> None:
    for built in repeated(programs.build_from_threads, 2, names=NAMES, seed=seed):
        assert built == [{name: alone(name) for name in NAMES}] * 2


@pytest.mark.parametrize(("size", "count"), [(2, 1), (3, 3), (4, 2)])
def test_builds_of_fewer_runners_and_on_more_ranks(
    repeated: Any, alone: Any, size: int, count: int
) -> None:
    names = NAMES[:count]
    for built in repeated(programs.build_from_threads, size, names=names, seed=size):
        assert built == [{name: alone(name, size) for name in names}] * size


#: The overrides of rank 1, and the fields that the errors on all ranks name.
DIFFERENT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "widths": ({"tp_size": 1, "pp_size": 2}, {"tp_size", "pp_size"}),
    "dtype": ({"dtype": "bfloat16"}, {"dtype"}),
    "attention backend": ({"attention_backend": "triton"}, {"attention_backend"}),
    "expert parallelism": ({"ep_size": 2}, {"moe_ep_size"}),
    "data-parallel attention": ({"dp_size": 2, "enable_dp_attention": True}, {"attn_dp_size"}),
    "context parallelism": ({"attn_cp_size": 2}, {"attn_cp_size"}),
    "model": ({"architecture": "mixtral"}, {"model_path"}),
    "checkpoint": ({"seed": 1}, {"model_path"}),
    "an override of the model's": (
        {"json_model_override_args": '{"rms_norm_eps": 0.5}'},
        {"json_model_override_args"},
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_that_ask_for_different_things_are_told_which(
    repeated: Any, alone: Any, case: str
) -> None:
    other, fields = DIFFERENT[case]
    for results in repeated(programs.ask_for_different_things, 2, overrides=[{}, other]):
        for told in results:
            assert told["error"]["type"] == "RanksDisagree"
            assert "ValueError" in told["error"]["kinds"]
            assert fields <= set(told["error"]["details"]["fields"])
            assert "rank 0" in told["error"]["text"]
            assert told["after"] == {name: alone(name) for name in ("dense", "experts")}


def test_ranks_that_ask_under_different_names_are_told_which_rank_is_missing(
    repeated: Any, alone: Any
) -> None:
    for told in repeated(programs.ask_under_different_names, 2):
        for rank, it in enumerate(told):
            assert it["error"]["type"] == "AgreementTimeout"
            assert it["error"]["details"]["missing"] == [1 - rank]
            assert f"runner of {rank}" in it["error"]["text"]
            assert it["after"] == {"experts": alone("experts")}


def test_an_absent_rank_is_named_and_gets_the_error_when_it_arrives(
    repeated: Any, alone: Any
) -> None:
    for told in repeated(programs.never_come, 2, absent=1):
        assert told[0]["error"]["type"] == told[1]["late"]["type"] == "AgreementTimeout"
        assert "TimeoutError" in told[0]["error"]["kinds"]
        assert told[0]["error"]["details"]["missing"] == [1]
        assert told[1]["late"]["details"]["missing"] == [1]
        for it in told:
            assert it["after"] == {"experts": alone("experts")}


def test_ctrl_c_while_waiting_for_other_ranks_fails_the_build_on_them_too(
    repeated: Any, alone: Any
) -> None:
    for told in repeated(programs.interrupted, 2):
        assert told[0]["error"]["type"] == "KeyboardInterrupt"
        assert told[1]["error"]["type"] == "RankFailed"
        assert list(told[1]["error"]["details"]["failures"]) == ["0"]
        for it in told:
            assert it["after"] == {"experts": alone("experts")}


@pytest.mark.parametrize("point", programs.FAULTS)
def test_a_rank_whose_build_raises_is_named_on_the_others(
    repeated: Any, alone: Any, point: str
) -> None:
    for told in repeated(programs.raise_on_one, 2, point=point, on=1):
        assert told[1]["error"]["type"] == "OSError"
        assert told[0]["error"]["type"] == "RankFailed"
        assert "RuntimeError" in told[0]["error"]["kinds"]
        assert told[0]["error"]["details"]["failures"] == {"1": f"OSError: no {point} today"}
        for it in told:
            assert it["left"] == []
            assert it["after"] == {name: alone(name) for name in ("dense", "experts")}


@pytest.mark.parametrize("point", ["creating a group", "load"])
def test_a_rank_that_dies_is_named_as_missing_and_the_others_make_a_new_world(
    ranks: RankRunner, alone: Any, point: str
) -> None:
    for _ in range(TIMES):
        told = ranks.run(programs.die_on_one, 3, point=point, on=1, may_die=True)
        assert told[1] is None
        for it in (told[0], told[2]):
            assert it["error"]["type"] == "AgreementTimeout"
            assert it["error"]["details"]["missing"] == [1]
            assert it["after"] == {"experts": alone("experts")}


def test_builds_that_the_ranks_could_not_tell_apart_are_refused_at_once(repeated: Any) -> None:
    for results in repeated(programs.build_anonymously, 2):
        for told in results:
            refused = [it for it in told if it is not None and it["type"] == "AmbiguousBuild"]
            assert len(refused) == 1
            assert "build_runner(name=...)" in refused[0]["text"]
            assert [it for it in told if it is None] == [None]


def test_weights_updated_at_once_in_opposite_order_are_those_of_each_runner_alone(
    repeated: Any, alone: Any
) -> None:
    names = ["dense", "experts"]
    for updated in repeated(programs.update_weights, 2, names=names):
        assert updated == [{name: alone(name, seed=1) for name in names}] * 2


def test_a_single_rank_asks_no_other_rank(ranks: RankRunner, alone: Any) -> None:
    (told,) = ranks.run(programs.one_rank, 1)
    assert told["called"] == []
    assert told["made"] == {name: alone(name, 1) for name in ("dense", "half")}


def test_every_rank_of_a_world_can_make_a_checkpoint(ranks: RankRunner, tmp_path: Any) -> None:
    first, second = ranks.run(programs.create_a_model, 2, folder=str(tmp_path))
    assert first == second
    assert {"config.json", "model.safetensors"} <= set(first)


def test_ranks_that_did_not_come_to_the_world_together_do_so_later(
    ranks: RankRunner, alone: Any
) -> None:
    for it in ranks.run(programs.try_a_world_alone_first, 2):
        assert it["made"] == alone("dense"), it["errors"]
        assert {error["type"] for error in it["errors"]} <= {"AgreementTimeout"}
