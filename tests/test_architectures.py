"""The sweep over architectures says what it ran: its table is whole, and it can tell right from wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_distguard.testing.catalog import CATALOG

ROOT = Path(__file__).resolve().parent.parent
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
    assert {"dense", "MoE", "encoder", "embedding", "scores", "reward"} <= kinds


@pytest.mark.parametrize(
    ("alone", "disturbed", "guarded", "audited", "category"),
    [
        ({}, {"same": True}, {"problems": []}, {"uncovered": []}, "right"),
        ({"error": 0.5}, {"same": True}, {"problems": []}, {"uncovered": []}, "off Hugging Face"),
        (
            {"error": float("nan")},
            {"same": True},
            {"problems": []},
            {"uncovered": []},
            "off Hugging Face",
        ),
        ({"repeatable": False}, {"same": True}, {"problems": []}, {"uncovered": []}, "undefined"),
        ({}, {"same": False}, {"problems": ["other bits"]}, {"uncovered": []}, "undefined"),
        ({}, {"same": True}, {"problems": ["other bits"]}, {"uncovered": []}, "FAILED"),
        ({}, {"same": True}, {"problems": []}, {"uncovered": ["m.x"]}, "FAILED"),
        ({}, {"same": True}, None, {"uncovered": []}, "FAILED"),
        ({}, {"same": True}, {"problems": []}, {"failed": "no", "where": ""}, "FAILED"),
        ({"failed": "no", "where": ""}, None, None, None, "does not run alone"),
    ],
)
def test_an_outcome_is_right_only_when_everything_was_run_and_was(
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


def test_experts_in_transformers_own_code_and_a_model_that_does_not_generate_are_right(
    sglang: None,
) -> None:
    """The sweep itself, shortened to what no other test builds.

    Two models of dots1 computed with the last one's experts when `_TRANSFORMERS_MOE_LAYERS` was shared.
    """
    command = [sys.executable, "verify/architectures.py", "--only", "dots1", "xlm_roberta_scores"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert re.findall(r"^(\w+): right", ran.stdout, re.M) == ["dots1", "xlm_roberta_scores"]
