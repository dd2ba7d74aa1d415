"""The reference results of runners equal those that a fresh process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from references import reference
from sglang_distguard.testing import bit_equal, fleet
from sglang_distguard.testing.solo import solo

#: Two of the fleet; `make stress` takes all eight.
EXAMPLES = (("llama", "float32"), ("qwen3_moe", "bfloat16"))


def check(cache: Path, empty: Path, member: tuple[str, str]) -> None:
    """Run one member in a fresh process, and compare its results with both kinds of reference."""
    (forked,) = fleet.members(cache, [member])
    fresh = solo(forked.model, forked.dtype, cache_dir=empty)
    for other in (forked.alone, reference(forked.model, forked.dtype, cache=empty / "forked")):
        assert bit_equal(fresh.logits, other.logits)
        assert fresh.tokens == other.tokens


@pytest.mark.parametrize("member", EXAMPLES, ids="-".join)
def test_the_reference_of_a_runner_is_that_of_a_fresh_process_bit_for_bit(
    sglang: None, cache: Path, tmp_path: Path, member: tuple[str, str]
) -> None:
    fleet.members(cache)  # made together, by forking
    check(cache, tmp_path, member)


@pytest.mark.slow
@pytest.mark.parametrize("member", fleet.MEMBERS, ids="-".join)
def test_every_reference_of_the_fleet_is_that_of_a_fresh_process(
    sglang: None, cache: Path, tmp_path: Path, member: tuple[str, str]
) -> None:
    fleet.members(cache)
    check(cache, tmp_path, member)
