"""The examples do what the README says of them."""

from __future__ import annotations

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
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    lines = ran.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "model 0",
        "model 1",
        "the same on 2 ranks",
    ]
    assert lines[-1] == "the same on 2 ranks: True"
