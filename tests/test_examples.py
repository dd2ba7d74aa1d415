"""The examples do what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
