"""For every layout, each runner owns all of its groups, and they equal those of plain SGLang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import layout_programs as programs
import pytest
from sglang_distguard.testing.ranks import RankRunner


@dataclass(frozen=True)
class Layout:
    """One layout; ``runs`` is False where plain SGLang 0.5.23 itself cannot forward on CPU."""

    size: int
    model: str
    overrides: dict[str, Any]
    runs: bool = True


#: docs/COMPATIBILITY.md says why some do not run.
LAYOUTS = {
    "tp 2": Layout(2, "dense", {"tp_size": 2}),
    "pp 2": Layout(2, "dense", {"tp_size": 1, "pp_size": 2}),
    "pp 2 experts": Layout(2, "experts", {"tp_size": 1, "pp_size": 2}),
    "tp 2 x pp 2": Layout(4, "dense", {"tp_size": 2, "pp_size": 2}),
    "attn cp 2": Layout(2, "experts", {"tp_size": 2, "attn_cp_size": 2}),
    "ep 2": Layout(2, "experts", {"tp_size": 2, "ep_size": 2}, runs=False),
    "attn dp 2": Layout(
        2, "dense", {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, runs=False
    ),
    "attn dp 2 x tp 2": Layout(
        4, "dense", {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, runs=False
    ),
    "ep 2 x moe tp 2": Layout(4, "experts", {"tp_size": 4, "ep_size": 2}, runs=False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_runner_owns_every_group_that_sglang_makes_and_no_other(
    ranks: RankRunner, repeated: Any, alone: Any, name: str
) -> None:
    layout = LAYOUTS[name]
    expected = ranks.run(programs.plain, layout.size, name=layout.model, overrides=layout.overrides)
    right = [alone(layout.model, layout.size, **layout.overrides)] * 2 if layout.runs else []
    for owned in repeated(
        programs.owned,
        layout.size,
        name=layout.model,
        overrides=layout.overrides,
        forwards=layout.runs,
    ):
        for rank, found in enumerate(owned):
            assert found["structures"] == [expected[rank]] * 2
            assert not set(found["members"][0]) & set(found["members"][1])
            assert found["of no runner"] == []
            assert found["left"] == []
            assert found["digests"] == right


@pytest.mark.parametrize(
    ("name", "one", "several"), [("tp 2", 10, 4), ("pp 2", 4, 4), ("attn cp 2", 8, 4)]
)
def test_equal_groups_of_one_member_are_one_group_for_each_runner(
    ranks: RankRunner, alone: Any, name: str, one: int, several: int
) -> None:
    """Each coordinator has two groups, and most coordinators of a layout have one member."""
    layout = LAYOUTS[name]
    right = [alone(layout.model, layout.size, **layout.overrides)] * 2
    for shares, expected in ((False, one), (True, 2)):
        for found in ranks.run(
            programs.count_groups,
            layout.size,
            name=layout.model,
            overrides=layout.overrides,
            shares=shares,
        ):
            assert found == {
                "one": [expected] * 2,
                "several": [several] * 2,
                "digests": right,
                "left": [expected + several, 0],
            }
