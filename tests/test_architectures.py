"""The sweep over architectures: its table is complete, and it tells right from wrong."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from interpreters import Has, run_well
from sglang_distguard.testing import bit_equal, server_args, steps
from sglang_distguard.testing.catalog import CATALOG, create

SEEDS = (0, 1)
ROUNDS = 3
ROOT = Path(__file__).resolve().parent.parent
SAME, OTHER = {"same": True}, {"same": False}
FINE: dict[str, Any] = {"problems": [], "other_bits": []}
RAISED = {**FINE, "problems": ["KeyError"]}
OTHER_BITS = {**FINE, "other_bits": ["round 0 differs"]}
COVERED: dict[str, Any] = {"uncovered": []}
UNCOVERED = {"uncovered": ["m.x"]}
NOTHING = {"failed": "no", "where": ""}
ALONE = {"error": 1e-6, "scale": 1.0, "repeatable": True, "class": "Some"}


def rows() -> dict[str, list[str]]:
    """The table of docs/ARCHITECTURES.md: cells by architecture."""
    text = (ROOT / "docs" / "ARCHITECTURES.md").read_text()
    found = re.search(r"<!-- architectures -->\n(.*?)\n<!-- /architectures -->", text, re.DOTALL)
    assert found is not None
    cells = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in found[1].split("\n")
    ]
    return {row[0]: row for row in cells[2:]}


def test_the_table_has_every_architecture_and_none_failed_with_the_guard() -> None:
    assert list(rows()) == list(CATALOG)
    outcomes = [row[4] for row in rows().values()]
    assert outcomes.count("right") >= 30
    assert [outcome for outcome in outcomes if "FAILED" in outcome] == []


def test_every_kind_of_model_is_among_those_that_are_right() -> None:
    kinds = {row[1] for row in rows().values() if row[4] == "right"}
    # SGLang 0.5.23 runs no model with latent attention or a state on a CPU without AMX.
    assert {entry.kind for entry in CATALOG.values()} - kinds <= {"MLA", "hybrid"}


@pytest.mark.parametrize(
    ("alone", "disturbed", "guarded", "audited", "category"),
    [
        ({}, SAME, FINE, COVERED, "right"),
        ({"error": 0.5}, SAME, FINE, COVERED, "off Hugging Face"),
        ({"error": float("nan")}, SAME, FINE, COVERED, "off Hugging Face"),
        ({"repeatable": False}, SAME, FINE, COVERED, "undefined"),
        ({"repeatable": False}, SAME, OTHER_BITS, COVERED, "undefined"),
        ({"repeatable": False}, SAME, RAISED, COVERED, "FAILED"),
        ({}, OTHER, OTHER_BITS, COVERED, "undefined"),
        ({}, OTHER, RAISED, COVERED, "FAILED"),
        ({}, OTHER, FINE, UNCOVERED, "FAILED"),
        ({}, NOTHING, FINE, COVERED, "FAILED"),
        ({}, None, FINE, COVERED, "FAILED"),
        ({}, SAME, OTHER_BITS, COVERED, "FAILED"),
        ({}, SAME, RAISED, COVERED, "FAILED"),
        ({}, SAME, FINE, UNCOVERED, "FAILED"),
        ({}, SAME, None, COVERED, "FAILED"),
        ({}, SAME, FINE, None, "FAILED"),
        ({}, SAME, FINE, NOTHING, "FAILED"),
        ({}, SAME, NOTHING, COVERED, "FAILED"),
        (NOTHING, None, None, None, "does not run alone"),
    ],
)
def test_an_outcome_is_right_only_when_everything_was_run_and_was_right(
    monkeypatch: pytest.MonkeyPatch,
    alone: dict[str, Any],
    disturbed: Any,
    guarded: Any,
    audited: Any,
    category: str,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "verify"))
    from architecture_outcomes import judge  # pyright: ignore[reportMissingImports]

    results = [ALONE, {**ALONE, **alone}]
    outcome = judge("llama", {}, results, disturbed, guarded, audited)
    assert outcome.category.startswith(category)


@pytest.mark.parametrize("name", ["dots1", "xlm_roberta_scores"])
def test_experts_in_transformers_own_code_and_a_model_that_does_not_generate_are_right(
    name: str, tmp_path: Path
) -> None:
    """Models that no other test builds: two of each at once, as the sweep does."""
    for seed in SEEDS:
        program("alone", name, tmp_path, seed)
    assert program("at_once", name, tmp_path) == "right"
    if name == "dots1":  # both compute with the last one's experts
        assert program("at_once", name, tmp_path, "_TRANSFORMERS_MOE_LAYERS") == "wrong"


def program(function: str, *arguments: Any) -> str:
    """Call a function of this file in another process; return the last line that it printed."""
    given = ", ".join(repr(str(it) if isinstance(it, Path) else it) for it in arguments)
    call = f"test_architectures.{function}({given})\n"
    printed = run_well("import test_architectures\n", call, has=Has.SGLANG)
    return printed.strip().splitlines()[-1]


def computed(name: str, runner: Any, **how: Any) -> Any:
    """Logits of a model that generates, scores of one that does not."""
    if runner.model_config.is_generation:
        return steps.generate(runner, **how).logits
    return steps.embed(runner, **how)


def settings(name: str, folder: str, seed: int) -> Any:
    return server_args(create(name, folder, seed=seed), **CATALOG[name].overrides)


def alone(name: str, folder: str, seed: int) -> None:
    """Make a checkpoint; save what its runner computes with plain SGLang."""
    import torch

    found = computed(name, steps.build(settings(name, folder, seed)))
    torch.save(found, Path(folder) / f"{seed}.pt")
    print("saved")


def at_once(name: str, folder: str, shared: str = "") -> None:
    """Build and run a runner of each checkpoint from two threads; ``shared``: no scope has its own."""
    import sglang_distguard
    import torch
    from sglang_distguard.hooks import generation_0_5_21, versions

    if shared:
        versions.GENERATIONS = {
            f"without {shared}": lambda: [
                it for it in generation_0_5_21.changes() if getattr(it, "name", "") != shared
            ]
        }
    sglang_distguard.install()
    meet = threading.Barrier(len(SEEDS))

    def work(seed: int) -> list[bool]:
        expected = torch.load(Path(folder) / f"{seed}.pt", weights_only=True)
        meet.wait()
        runner = sglang_distguard.build_runner(settings(name, folder, seed), name=str(seed))
        meet.wait()
        made = [computed(name, runner, activate=sglang_distguard.activate) for _ in range(ROUNDS)]
        return [bit_equal(it, expected) for it in made]

    with ThreadPoolExecutor(len(SEEDS)) as pool:
        outcomes = [it for found in pool.map(work, SEEDS) for it in found]
    print("right" if len(outcomes) == ROUNDS * len(SEEDS) and all(outcomes) else "wrong")
