"""SGLang's CPU graph runner on a machine without its CPU kernels; ``python graph_programs.py MODEL FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

#: Decode batches of two are compiled; SGLang's own CPU graphs (0.5.23: torch.compile) do the rest.
GRAPHS: dict[str, Any] = {
    "disable_cuda_graph": False,
    "enable_torch_compile": True,
    "torch_compile_max_bs": 2,
    "cuda_graph_bs_decode": [2],
}


def prepare() -> None:
    """Let CPU graphs be captured over plain torch: without AMX there is no attention kernel that can.

    0.5.23 captures on CPUs over `intel_amx` only, and tells torch.compile the shapes of kernels that
    are not here; both are answered for. Everything else is SGLang's.
    """
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.model_executor import cpu_graph_runner

    class NativeWithGraphs(TorchNativeAttnBackend):
        def init_cpu_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
            pass

        def get_cpu_graph_seq_len_fill_value(self) -> int:
            return 1

        def init_forward_metadata_capture_cpu_graph(self, *args: Any) -> None:
            self.swa_out_cache_loc = None

    attention_registry.ATTENTION_BACKENDS["torch_native"] = NativeWithGraphs
    cpu_graph_runner.register_fake_ops = lambda tp_size: None


def main(model: str, output: str) -> None:
    """One runner with graphs as plain SGLang builds it, alone; its logits to ``output``."""
    import torch
    from sglang_distguard.testing import build, generate, prepare_environment, server_args

    prepare_environment()
    prepare()
    runner: Any = build(server_args(model, **GRAPHS))
    assert type(runner.decode_cuda_graph_runner).__name__ == "CPUGraphRunner"
    torch.save(generate(runner).logits, Path(output))


if __name__ == "__main__":
    main(*sys.argv[1:])
