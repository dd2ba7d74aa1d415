"""Compares a runner's output with Hugging Face's own model, by error or bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    import torch


def huggingface(
    model_path: str | Path,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    *,
    dtype: Optional[torch.dtype] = None,
) -> torch.Tensor:
    """Logits of Hugging Face's model on the same prefixes (teacher-forced).

    Args:
        model_path: directory of the checkpoint.
        prompts: token ids.
        tokens: generated token ids per prompt; ``tokens[p][:s]`` precedes step ``s``.
        dtype: of the computation; default float32.

    Returns:
        Shape [steps + 1, prompts, vocabulary], as ``Generation.logits``, on the CPU.

    Raises:
        ValueError: there is not one list of tokens per prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype or torch.float32).eval()
    with torch.no_grad():
        columns = []
        for prompt, generated in zip(prompts, tokens, strict=True):
            ids = torch.tensor([[*prompt, *generated[:-1]]])
            columns.append(model(ids).logits[0, len(prompt) - 1 :])
        return torch.stack(columns, dim=1)


def max_abs_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference of two tensors of one shape, computed in float64.

    Raises:
        ValueError: their shapes differ (they are not broadcast).
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    return float((actual.double() - expected.double()).abs().max())


def bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits (equal NaNs are equal, 0 is not -0)."""
    import torch

    return (
        actual.dtype == expected.dtype
        and actual.shape == expected.shape
        and torch.equal(_bytes(actual), _bytes(expected))
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
