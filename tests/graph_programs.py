"""One runner with SGLang's CPU graphs, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def main(model: str, output: str) -> None:
    """Build the runner with plain SGLang and save its logits to ``output``."""
    import torch
    from sglang_distguard.testing import build, generate, graphs, prepare_environment, server_args

    prepare_environment()
    graphs.allow_cpu_graphs()
    runner: Any = build(server_args(model, **graphs.CPU_GRAPHS))
    assert type(runner.decode_cuda_graph_runner).__name__ == "CPUGraphRunner"
    torch.save(generate(runner).logits, Path(output))
