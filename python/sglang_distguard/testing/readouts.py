"""The output of a catalog entry's Hugging Face model for prompts, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_distguard.testing.catalog.items import Prompt

if TYPE_CHECKING:
    import torch


def _last_token(output: Any) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(output.last_hidden_state[0, -1], dim=-1)


def _first_token(output: Any) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(output.last_hidden_state[0, 0], dim=-1)


def _mean(output: Any) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(output.last_hidden_state[0].mean(dim=0), dim=-1)


def _scores(output: Any) -> torch.Tensor:
    return output.logits[0]


#: Name -> function of a transformers model's output for one prompt, as SGLang pools it.
READOUTS: dict[str, Callable[[Any], torch.Tensor]] = {
    "last token": _last_token,
    "first token": _first_token,
    "mean": _mean,
    "scores": _scores,
}


def pooled(model: Any, prompts: Sequence[Prompt], readout: str) -> torch.Tensor:
    """Embedding or scores of each prompt, shape [prompts, width]; ``readout``: key of READOUTS."""
    import torch

    with torch.no_grad():
        return torch.stack(
            [READOUTS[readout](model(**it.reference(torch.tensor([it.ids])))) for it in prompts]
        )


def greedy(
    model: Any, prompts: Sequence[Prompt], steps: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens and logits of greedy decoding, every step from the whole prefix, without a cache.

    Returns:
        Per prompt ``steps + 1`` token ids; logits of shape [steps + 1, prompts, vocabulary].
    """
    import torch

    tokens: list[list[int]] = []
    columns = []
    with torch.no_grad():
        for prompt in prompts:
            ids, rows = list(prompt.ids), []
            for _ in range(steps + 1):
                given = prompt.reference(torch.tensor([ids]))
                rows.append(model(**given, use_cache=False).logits[0, -1])
                ids.append(int(rows[-1].argmax()))
            tokens.append(ids[len(prompt.ids) :])
            columns.append(torch.stack(rows))
    return tokens, torch.stack(columns, dim=1)
