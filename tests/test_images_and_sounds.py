"""Models of images and sounds with real items: the same items, other weights, in one process.

SGLang keeps what a model's encoder makes of an item by the item alone. Every program here runs in a
process of its own, and a runner alone runs without the guard.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from interpreters import Has, run_well
from sglang_distguard.testing import bit_equal, server_args, steps
from sglang_distguard.testing.catalog import CATALOG, create

SEEDS = (0, 1)
ROUNDS = 3


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_audio"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of an architecture, and a folder with two checkpoints and their logits alone."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed in SEEDS:
        assert program("alone", request.param, folder, seed) == "other items, other logits"
    return request.param, folder


def program(function: str, *arguments: Any) -> str:
    """Call a function of this file in another process; return the last line that it printed."""
    given = ", ".join(repr(str(it) if isinstance(it, Path) else it) for it in arguments)
    call = f"test_images_and_sounds.{function}({given})\n"
    printed = run_well("import test_images_and_sounds\n", call, has=Has.SGLANG)
    return printed.strip().splitlines()[-1]


def test_two_runners_compute_with_the_same_items_at_once(case: Any) -> None:
    assert program("at_once", *case) == "right"


def test_one_cache_of_embeddings_for_both_gives_one_the_embeddings_of_the_other(case: Any) -> None:
    name, folder = case
    assert program("at_once", name, folder, "embedding_cache") == "wrong"


def test_a_model_that_replaces_another_at_its_path_makes_its_own_of_the_same_items(
    case: Any, tmp_path: Path
) -> None:
    assert program("one_after_the_other", *case, tmp_path / "checkpoint") == "right"


def logits(name: str, runner: Any, *, other: int = 0, activate: Any = nullcontext) -> Any:
    """Logits of the catalog's prompts; ``other`` items if that is not 0."""
    make = CATALOG[name].items
    assert make is not None
    prompts = [make(ids, number + other) for number, ids in enumerate(steps.PROMPTS)]
    items = [it.item for it in prompts]
    return steps.generate(
        runner, [it.ids for it in prompts], 2, items=items, activate=activate
    ).logits


def alone(name: str, folder: str, seed: int) -> None:
    """Make a checkpoint; save the logits of its runner with plain SGLang."""
    import torch

    runner = steps.build(server_args(create(name, folder, seed=seed)))
    found = logits(name, runner)
    torch.save(found, Path(folder) / f"{seed}.pt")
    changed = not bit_equal(logits(name, runner, other=10), found)
    print("other items, other logits" if changed else "the items have no effect")


def is_right(found: Any, folder: str, seed: int) -> bool:
    import torch

    return bit_equal(found, torch.load(Path(folder) / f"{seed}.pt", weights_only=True))


def at_once(name: str, folder: str, shared: str = "") -> None:
    """Build and run a runner of each checkpoint from two threads; ``shared``: no scope has its own."""
    import sglang_distguard
    from sglang_distguard.hooks import generation_0_5_21, versions

    if shared:
        versions.GENERATIONS = {
            f"without {shared}": lambda: [
                change
                for change in generation_0_5_21.changes()
                if getattr(change, "name", "") != shared
            ]
        }
    sglang_distguard.install()
    meet = threading.Barrier(len(SEEDS))
    outcomes: list[bool] = []

    def work(seed: int) -> None:
        with sglang_distguard.runner_scope(str(seed)):
            runner = steps.build(server_args(create(name, folder, seed=seed)))
        for _ in range(ROUNDS):
            meet.wait()
            found = logits(name, runner, activate=sglang_distguard.activate)
            outcomes.append(is_right(found, folder, seed))

    in_threads(work)
    assert len(outcomes) == ROUNDS * len(SEEDS)
    print("right" if all(outcomes) else "wrong")


def in_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(seed,)) for seed in SEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_after_the_other(name: str, folder: str, place: str) -> None:
    """Build, run and close a runner of each checkpoint at one path."""
    import sglang_distguard

    sglang_distguard.install()
    outcomes = []
    for seed in SEEDS:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(create(name, folder, seed=seed), place)
        runner = sglang_distguard.build_runner(server_args(place), name="the only one")
        found = logits(name, runner, activate=sglang_distguard.activate)
        outcomes.append(is_right(found, folder, seed))
        sglang_distguard.close(runner)
        del runner
    print("right" if all(outcomes) else "wrong")
