"""The examples do what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreters import Has, facts_of, run_well

ROOT = Path(__file__).resolve().parent.parent


def test_two_runners_over_two_ranks_started_by_torchrun() -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            "examples/two_runners.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    lines = ran.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "model 0",
        "model 1",
        "the same on 2 ranks",
    ]
    assert lines[-1] == "the same on 2 ranks: True"


def test_the_program_in_the_readme_runs_as_it_stands_and_prints_what_stands_there(
    tmp_path: Path,
) -> None:
    found = re.search(
        r"<!-- program -->\n```python\n(.*?)```\n<!-- /program -->\n\n```\n(.*?)```",
        (ROOT / "README.md").read_text(),
        re.DOTALL,
    )
    assert found is not None
    program = tmp_path / "program.py"
    program.write_text(found[1])
    ran = subprocess.run(
        [sys.executable, str(program)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert ran.stdout == found[2]


def test_an_application_of_ones_own_with_a_pool_in_it() -> None:
    facts = facts_of("example_programs.embedded_pool()")
    assert facts["models"] == ["chat", "embed"]
    assert facts["nearest"]["sentence"] in ("Where is it?", "Then.")
    assert facts["text"].startswith(" word399")


def test_the_walk_through_engines_runs_from_cell_to_cell() -> None:
    printed = run_well(
        "import example_programs\nexample_programs.engines_walkthrough()", has=Has.SGLANG
    ).splitlines()
    assert printed[:2] == ["chat serving 0", "embed serving 0"]
    assert printed[2].startswith(" word399")
    assert printed[3] == "64 numbers"
    assert all(printed[2].startswith(text) for text in printed[4:7])
    assert printed[7:] == [
        "6 tokens, 64 numbers",
        "answered meanwhile: True",
        "embed 9 tokens of prompts",
        "[]",
    ]


@pytest.mark.ranks
def test_two_processes_of_two_models_behind_sglangs_router() -> None:
    ran = subprocess.run(
        [sys.executable, "examples/router.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert ran.stdout.splitlines() == [
        "one answer of all: True",
        "processes that answered: 2",
        "exit status of one process: 0",
        "one answer meanwhile: True",
        "one answer of the others: True",
    ]
