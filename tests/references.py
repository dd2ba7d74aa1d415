"""Reference results of single runners, made by processes that fork (`interpreters`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from conftest import CACHE
from interpreters import Has, run_well
from sglang_distguard.testing import Generation, solo
from sglang_distguard.testing.solo import Job


def reference(model: Path, dtype: str = "float32", *, cache: Path = CACHE) -> Generation:
    """What ``solo`` returns, without the 15 s in which a new process imports SGLang.

    Shown to be the same bits in test_references.
    """
    return solo(model, dtype, cache_dir=cache / "solo", run=_forked)


def _forked(missing: Mapping[Path, Job]) -> None:
    for file, job in missing.items():
        run_well(
            "from pathlib import Path\nfrom sglang_distguard.testing.solo import Job, run_here\n",
            f"run_here(Path({str(file)!r}), Job(**{dataclasses.asdict(job)!r}))",
            has=Has.SGLANG,
        )
