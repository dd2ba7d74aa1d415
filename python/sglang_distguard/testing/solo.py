"""The same runner built and run alone, in a fresh process without the guard: the expected bits.

``python -m sglang_distguard.testing.solo MODEL DTYPE FILE`` writes one generation to FILE.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Optional

from sglang_distguard.testing.steps import PROMPTS, Generation, build, generate

STEPS = 3


def solo_many(
    requests: Sequence[tuple[Path, str]], cache: Path, *, workers: Optional[int] = None
) -> list[Generation]:
    """One generation (``PROMPTS``, 3 decode steps) per model and dtype, each in its own process.

    Args:
        requests: (checkpoint directory, dtype).
        cache: folder where results are kept, by model, dtype and versions.
        workers: processes at a time; default one per core.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda request: _solo(*request, cache=cache), requests))


def _solo(model: Path, dtype: str, *, cache: Path) -> Generation:
    file = cache / f"{_fingerprint(model, dtype)}.pt"
    if not file.is_file():
        print(f"  reference run alone: {model.name} {dtype}", file=sys.stderr, flush=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name != "SGLANG_ALLOW_REUSE_DISTRIBUTED"
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(model), dtype, str(scratch)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{model.name} {dtype} failed alone:\n{done.stderr[-4000:]}")
        scratch.replace(file)
    return _load(file)


def _fingerprint(model: Path, dtype: str) -> str:
    facts = {
        "config": (model / "config.json").read_text(),
        "weights": hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest(),
        "dtype": dtype,
        "prompts": PROMPTS,
        "steps": STEPS,
        "versions": [version("sglang"), version("torch"), version("transformers")],
        "threads": os.cpu_count(),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{model.name}-{dtype}-{digest[:16]}"


def _load(file: Path) -> Generation:
    import torch

    data = torch.load(file, weights_only=True)
    return Generation(tokens=data["tokens"], logits=data["logits"])


def main(argv: Sequence[str]) -> None:
    """Build and run one model alone; write its generation."""
    import torch

    from sglang_distguard.installation import is_installed
    from sglang_distguard.testing.recipe import prepare_environment, server_args

    model, dtype, file = argv
    prepare_environment()
    assert not is_installed(), "a reference is made without the guard"
    result = generate(build(server_args(model, dtype=dtype)), PROMPTS, STEPS)
    torch.save({"tokens": result.tokens, "logits": result.logits}, file)


if __name__ == "__main__":
    main(sys.argv[1:])
