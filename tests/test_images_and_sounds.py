"""Models of images and sounds with real items: the same items, other weights, in one process.

SGLang keeps what a model's encoder makes of an item by the item alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from catalog_programs import SEEDS, alone, at_once, computed, is_right, program
from sglang_distguard.testing import server_args
from sglang_distguard.testing.catalog import create


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_audio"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of an architecture, and a folder with two checkpoints and their logits alone."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed in SEEDS:
        assert program(alone, request.param, folder, seed) == "other items, other logits"
    return request.param, folder


def test_two_runners_compute_with_the_same_items_at_once(case: Any) -> None:
    assert program(at_once, *case) == "right"


def test_one_cache_of_embeddings_for_both_gives_one_the_embeddings_of_the_other(case: Any) -> None:
    name, folder = case
    assert program(at_once, name, folder, "embedding_cache") == "wrong"


def test_a_model_that_replaces_another_at_its_path_makes_its_own_of_the_same_items(
    case: Any, tmp_path: Path
) -> None:
    assert program(one_after_the_other, *case, tmp_path / "checkpoint") == "right"


def one_after_the_other(name: str, folder: str, place: str) -> None:
    """Build, run and close a runner of each checkpoint at one path."""
    import sglang_distguard

    sglang_distguard.install()
    outcomes = []
    for seed in SEEDS:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(create(name, folder, seed=seed), place)
        runner = sglang_distguard.build_runner(server_args(place), name="the only one")
        found = computed(name, runner, activate=sglang_distguard.activate)
        outcomes.append(is_right(found, folder, seed))
        sglang_distguard.close(runner)
        del runner
    print("right" if all(outcomes) else "wrong")
