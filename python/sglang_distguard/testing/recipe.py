"""Settings with which sglang 0.5.23 runs real models on a machine without CUDA."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_ENVIRONMENT = {
    # Llama and the MoE models need the CPU engine's code paths; GPT-2 and OPT run with them too.
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # With several ranks sglang looks for NCCL, finds torch's own, and then needs a GPU.
    "SGLANG_NCCL_SO_PATH": "/nonexistent.so",
    # With several ranks sglang 0.5.23 refuses to build when their free memory differs by a tenth. On
    # a CPU that is the machine's, seen at different moments: other processes change it.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",
    # torch 2.14.1 looks up the name of every address it connects to, which takes 5 s where a name
    # server is slow.
    "RES_OPTIONS": "timeout:1 attempts:2",
}
_NCCL = "sglang.srt.distributed.device_communicators.pynccl_wrapper"


def prepare_environment(*, ranks: int = 1) -> None:
    """Make sglang importable and quiet in this process; call it before any import of sglang.

    Without CUDA, it sets environment variables (those already set keep their value) and puts
    sglang's own stub in the place of ``sgl_kernel``. With CUDA, it only silences warnings and logs.
    It may be called again.

    Args:
        ranks: largest number of ranks on this host. If more than one, each rank computes on one
            core, and ranks share cores if there are fewer cores.

    Raises:
        RuntimeError: there is no CUDA and the real ``sgl_kernel`` was imported already, or sglang
            has already decided not to use its CPU engine.
    """
    import torch

    _quiet()
    if torch.cuda.is_available() or _is_stub(sys.modules.get("sgl_kernel")):
        return
    if "sgl_kernel" in sys.modules:
        raise RuntimeError(
            "sgl_kernel was imported before prepare_environment(), which puts sglang's stub in its "
            "place on machines without CUDA; call prepare_environment() first"
        )
    cores = itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), ranks)
    bound = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))} if ranks > 1 else {}
    for name, value in {**_ENVIRONMENT, **bound}.items():
        os.environ.setdefault(name, value)
    from sglang.srt.utils import is_cpu
    from sglang.test.test_utils import maybe_stub_sgl_kernel

    if not is_cpu():  # sglang caches this at its first import
        raise RuntimeError(
            "sglang was imported, or SGLANG_USE_CPU_ENGINE was set to a value other than 1, before "
            "prepare_environment(); on a machine without CUDA call prepare_environment() first"
        )
    # It logs at level ERROR that there is no NCCL.
    logging.getLogger(_NCCL).setLevel(logging.CRITICAL)
    maybe_stub_sgl_kernel()
    importlib.import_module("sgl_kernel")  # so that the next call finds the stub


def _is_stub(module: Optional[ModuleType]) -> bool:
    # Read from __dict__, because the stub answers every getattr, also for __file__.
    return module is not None and vars(module).get("__file__") is None


def _quiet() -> None:
    """Silence what sglang and transformers print on every import, to keep real output readable."""
    warnings.filterwarnings("ignore", module=r"sglang\..*|torch\..*|transformers\..*")
    for name in ("sglang", "transformers", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def server_args(model_path: str | Path, *, dtype: str = "float32", **overrides: Any) -> ServerArgs:
    """SGLang's settings for one small runner.

    Args:
        model_path: directory of a checkpoint.
        dtype: "float32" or "bfloat16".
        **overrides: ``ServerArgs`` fields that override the recipe's.

    Raises:
        TypeError: an override is not a field of ``ServerArgs``.
    """
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(**{"model_path": str(model_path), **settings(dtype), **overrides})


def settings(dtype: str = "float32") -> dict[str, Any]:
    """The fields of ``ServerArgs`` of one small runner.

    Args:
        dtype: "float32" or "bfloat16".
    """
    import torch

    on_gpu = torch.cuda.is_available()
    return {
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
