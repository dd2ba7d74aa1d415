"""SGLang's CPU graphs (0.5.23: torch.compile) without its CPU kernels, which require AMX."""

from __future__ import annotations

from typing import Any

#: ``ServerArgs`` fields that override the recipe's: decode batches of two are captured.
CPU_GRAPHS: dict[str, Any] = {
    "disable_cuda_graph": False,
    "enable_torch_compile": True,
    "torch_compile_max_bs": 2,
    "cuda_graph_bs_decode": [2],
}
#: The same for CUDA graphs.
CUDA_GRAPHS: dict[str, Any] = {
    "disable_cuda_graph": False,
    "cuda_graph_bs_decode": [1, 2],
    "cuda_graph_max_bs_decode": 2,
}


def allow_cpu_graphs() -> None:
    """Allow this process to capture CPU graphs with plain torch, from now on.

    On CPUs, 0.5.23 captures only with `intel_amx`, and tells torch.compile the shapes of kernels
    that are missing here. Both are replaced; everything else is SGLang's.
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
