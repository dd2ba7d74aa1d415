"""Runs real SGLang on small models that this package makes itself, for tests, demo and benchmarks.

Use it for your own, too. It needs sglang. On a machine without CUDA, sglang's own stub replaces
sgl_kernel.
"""

from sglang_distguard.config.ports import free_port
from sglang_distguard.testing.models import ARCHITECTURES, create_model
from sglang_distguard.testing.recipe import prepare_environment, server_args
from sglang_distguard.testing.reference import bit_equal, huggingface, max_abs_error
from sglang_distguard.testing.solo import solo, solo_many
from sglang_distguard.testing.steps import PROMPTS, Generation, build, generate

__all__ = [
    "ARCHITECTURES",
    "PROMPTS",
    "Generation",
    "bit_equal",
    "build",
    "create_model",
    "free_port",
    "generate",
    "huggingface",
    "max_abs_error",
    "prepare_environment",
    "server_args",
    "solo",
    "solo_many",
]
