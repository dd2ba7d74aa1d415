"""The sweep over architectures: its table is complete, and it tells right from wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from catalog_programs import SEEDS, alone, at_once, program
from sglang_distguard.testing.catalog import CATALOG

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
        program(alone, name, tmp_path, seed)
    assert program(at_once, name, tmp_path) == "right"
    if name == "dots1":  # both compute with the last one's experts
        assert program(at_once, name, tmp_path, "_TRANSFORMERS_MOE_LAYERS") == "wrong"
