"""Reference results of single runners, made by processes that fork (`interpreters`)."""

from __future__ import annotations

import functools
from pathlib import Path

from conftest import CACHE
from interpreters import Has, run_well
from sglang_distguard.testing import Generation, solo


@functools.cache
def reference(model: Path, dtype: str = "float32") -> Generation:
    """What ``solo`` returns, without the 15 s in which a new process imports SGLang.

    Shown to be the same bits in test_references.
    """
    run_well(
        "from pathlib import Path\nfrom sglang_distguard.testing.solo import keep\n",
        f"keep({str(model)!r}, {dtype!r}, cache_dir=Path(CACHE) / 'solo')",
        has=Has.SGLANG,
    )
    return solo(model, dtype, cache_dir=CACHE / "solo")
