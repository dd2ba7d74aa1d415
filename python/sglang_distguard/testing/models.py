"""Tiny checkpoints of real architectures with random weights, written once and kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

from sglang_distguard.testing.random_numbers import drawing_from

VOCABULARY = 1000
#: Returns the transformers model class and its configuration.
Builder = Callable[[], tuple[Any, Any]]


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


DECODER: dict[str, Any] = {
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

    return LlamaForCausalLM, LlamaConfig(**DECODER)


def _mixtral() -> tuple[Any, Any]:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM, MixtralConfig(
        **DECODER, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    )


def _qwen3_moe() -> tuple[Any, Any]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings: dict[str, Any] = {
        **DECODER,
        "moe_intermediate_size": 64,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**settings)


#: The five architectures that tests and demo run; `testing.catalog` has all others too.
ARCHITECTURES: dict[str, Builder] = {
    "gpt2": _gpt2,
    "opt": _opt,
    "llama": _llama,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}


def create_model(
    architecture: str,
    directory: str | Path,
    *,
    seed: int = 0,
    builders: Mapping[str, Builder] = ARCHITECTURES,
    adjust: Optional[Callable[[Any], None]] = None,
) -> Path:
    """Write a checkpoint (float32, safetensors) and return its directory; keep an existing one.

    Several processes may call this at once: a checkpoint appears whole or not at all. Its weights
    are those of the seed, whatever other threads draw from torch's own generator meanwhile. Where
    torch's default dtype is not float32, it is changed for a moment, in the whole process: call
    this while no other thread builds a model then.

    Args:
        architecture: a key of ``builders``.
        directory: folder of the checkpoints; the new one is a folder in it.
        seed: of the random weights.
        builders: the known architectures.
        adjust: called with the new model before it is written; may draw random numbers.

    Returns:
        The checkpoint's own directory, ``directory / "<architecture>-<seed>"``.

    Raises:
        KeyError: unknown architecture.
    """
    builder = builders[architecture]
    target = Path(directory) / f"{architecture}-{seed}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        kind, config = builder()
        _save(_random_model(kind, config, seed, adjust), scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        os.rename(scratch, target)  # atomic; fails if another process was first
    except OSError:
        if not (target / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _save(model: Any, directory: Path) -> None:
    """Write the checkpoint without the progress bar, which takes longer than the writing."""
    from transformers.utils import logging

    # In an initialised world transformers 5.19 writes on rank 0 only; here the first caller writes.
    model.should_save_on_this_rank = lambda is_main_process: True
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if shown:
            logging.enable_progress_bar()


def _random_model(
    kind: Any, config: Any, seed: int, adjust: Optional[Callable[[Any], None]]
) -> Any:
    import torch

    default = torch.get_default_dtype()
    with drawing_from(torch.Generator().manual_seed(seed)):
        try:
            if default is not torch.float32:
                torch.set_default_dtype(torch.float32)  # the weights depend on it
            model = kind(config)
            if adjust is not None:
                adjust(model)
            return model
        finally:
            if default is not torch.float32:
                torch.set_default_dtype(default)
