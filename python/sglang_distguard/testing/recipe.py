"""Settings with which sglang 0.5.23 runs real models on a machine without CUDA."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_ENVIRONMENT = {
    # Llama and the MoE models need the CPU engine's code paths; GPT-2 and OPT run with them too.
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def prepare_environment() -> None:
    """Set what has to be set before sglang is imported; nothing on a machine with CUDA.

    Raises:
        RuntimeError: something imported ``sgl_kernel`` before, which needs CUDA libraries.
    """
    import torch

    _quiet()
    if torch.cuda.is_available():
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from sglang.test.test_utils import maybe_stub_sgl_kernel

    kernel = sys.modules.get("sgl_kernel")
    if kernel is not None and getattr(kernel, "__file__", None):
        raise RuntimeError(
            "sgl_kernel was imported before prepare_environment(), which puts sglang's stub in its "
            "place on machines without CUDA; call prepare_environment() first"
        )
    maybe_stub_sgl_kernel()


def _quiet() -> None:
    """Keep what sglang and transformers say on every import out of the way of real output."""
    warnings.filterwarnings("ignore", module=r"sglang\..*|torch\..*|transformers\..*")
    for name in ("sglang", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def server_args(model_path: str | Path, *, dtype: str = "float32", **overrides: Any) -> ServerArgs:
    """SGLang's settings for one small runner.

    Args:
        model_path: directory of a checkpoint.
        dtype: "float32" or "bfloat16".
        **overrides: any ``ServerArgs`` field.
    """
    import torch
    from sglang.srt.server_args import ServerArgs

    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "model_path": str(model_path),
        "device": "cuda" if on_gpu else "cpu",
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "attention_backend": "triton" if on_gpu else "torch_native",
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "disable_overlap_schedule": True,
        "disable_custom_all_reduce": True,
        "max_total_tokens": 1024,
        "max_running_requests": 8,
        "mem_fraction_static": 0.3,
        "random_seed": 0,
        "log_level": "error",
    }
    return ServerArgs(**{**settings, **overrides})


def free_port() -> int:
    """A TCP port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
