"""Tiny checkpoints of real architectures with random weights, written once and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 1000


def _gpt2() -> tuple[Any, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel, GPT2Config(
        n_layer=2, n_head=4, n_embd=64, vocab_size=VOCABULARY, n_positions=256
    )


def _opt() -> tuple[Any, Any]:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM, OPTConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=64,
        ffn_dim=128,
        word_embed_proj_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )


_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM, LlamaConfig(**_DECODER)


def _mixtral() -> tuple[Any, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM, MixtralConfig(
        **_DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )


def _qwen3_moe() -> tuple[Any, Any]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        **_DECODER,
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings)


#: Name -> function returning the transformers model class and its configuration.
ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}


def create_model(architecture: str, directory: str | Path, *, seed: int = 0) -> Path:
    """Write a checkpoint (float32, safetensors) and return its directory; keep one that is there.

    Safe to call from several processes at once. Leaves torch's random state as it was.

    Args:
        architecture: a key of ``ARCHITECTURES``.
        directory: where checkpoints are kept; the new one is a folder inside.
        seed: of the random weights.

    Raises:
        KeyError: unknown architecture.
    """
    import torch

    target = Path(directory) / f"{architecture}-{seed}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    kind, config = ARCHITECTURES[architecture]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).to(torch.float32)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    model.save_pretrained(scratch)
    try:
        os.rename(scratch, target)  # atomic, and refused when another process was first
    except OSError:
        shutil.rmtree(scratch)
        if not (target / "config.json").is_file():
            raise
    return target
