"""Two runners of one architecture of the catalog with other weights, alone and at once.

Every program runs in a process of its own, and a runner alone runs without the guard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from interpreters import Has, run_well
from sglang_distguard.testing import bit_equal, server_args, steps
from sglang_distguard.testing.catalog import CATALOG, create

SEEDS = (0, 1)
ROUNDS = 3


def program(function: Callable[..., None], *arguments: Any) -> str:
    """Call a function of a module here in another process; return the last line that it printed."""
    given = ", ".join(repr(str(it) if isinstance(it, Path) else it) for it in arguments)
    module = function.__module__
    call = f"{module}.{function.__name__}({given})\n"
    return run_well(f"import {module}\n", call, has=Has.SGLANG).strip().splitlines()[-1]


def computed(name: str, runner: Any, *, other: int = 0, activate: Any = nullcontext) -> Any:
    """Logits, or scores of a model that does not generate; ``other`` items if that is not 0."""
    if not runner.model_config.is_generation:
        return steps.embed(runner, activate=activate)
    make = CATALOG[name].items
    if make is None:
        return steps.generate(runner, steps=2, activate=activate).logits
    prompts = [make(ids, number + other) for number, ids in enumerate(steps.PROMPTS)]
    items = [it.item for it in prompts]
    return steps.generate(
        runner, [it.ids for it in prompts], 2, items=items, activate=activate
    ).logits


def settings(name: str, folder: str, seed: int) -> Any:
    return server_args(create(name, folder, seed=seed), **CATALOG[name].overrides)


def alone(name: str, folder: str, seed: int) -> None:
    """Make a checkpoint; save what its runner computes with plain SGLang."""
    import torch

    runner = steps.build(settings(name, folder, seed))
    found = computed(name, runner)
    torch.save(found, Path(folder) / f"{seed}.pt")
    changed = not bit_equal(computed(name, runner, other=10), found)
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
            runner = steps.build(settings(name, folder, seed))
        for _ in range(ROUNDS):
            meet.wait()
            found = computed(name, runner, activate=sglang_distguard.activate)
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
