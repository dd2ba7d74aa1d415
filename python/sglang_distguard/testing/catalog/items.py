"""Prompts with an image or a sound, as SGLang's processors and Hugging Face's models take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import torch

#: Ids within the vocabulary, none of which is in ``PROMPTS``: what stands before an item, for each
#: of its embeddings, and after it; and what would stand for a video.
START, PLACEHOLDER, END, VIDEO = 990, 991, 992, 993
#: Number of a prompt's tokens before the item.
_BEFORE = 4


def _text(ids: torch.Tensor) -> Mapping[str, Any]:
    return {"input_ids": ids}


@dataclass(frozen=True)
class Prompt:
    """One prompt, alone or with an item.

    Attributes:
        ids: its token ids, with the placeholder once for each embedding of the item.
        reference: returns the arguments of Hugging Face's model for ids that begin with ``ids``;
            shape [1, length].
        item: returns SGLang's ``MultimodalInputs``, new ones for each request, which changes them.
    """

    ids: tuple[int, ...]
    reference: Callable[[torch.Tensor], Mapping[str, Any]] = _text
    item: Optional[Callable[[], Any]] = None


#: Makes of a prompt's ids, and a number that decides the item's content, a prompt with an item.
Maker = Callable[[Sequence[int], int], Prompt]


def placed(ids: Sequence[int], count: int) -> tuple[int, ...]:
    """Return ``ids`` with an item of ``count`` embeddings in them."""
    return (*ids[:_BEFORE], START, *[PLACEHOLDER] * count, END, *ids[_BEFORE:])


def noise(number: int, *shape: int) -> torch.Tensor:
    """Content of an item: the same values for the same number, in float32."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def inputs(
    modality: str,
    ids: Sequence[int],
    feature: torch.Tensor,
    data: Mapping[str, Any],
    **fields: Any,
) -> Any:
    """SGLang's inputs of a prompt with one item, by SGLang's own way from a processor's output.

    Args:
        modality: "IMAGE" or "AUDIO".
        ids: the prompt's token ids; the item's place is where the placeholders are.
        feature: what the model's encoder takes.
        data: further data of the item, as the model's processor in SGLang gives it.
        **fields: of ``MultimodalProcessorOutput``.
    """
    from sglang.srt.managers.schedule_batch import (
        Modality,
        MultimodalDataItem,
        MultimodalInputs,
        MultimodalProcessorOutput,
    )

    places = [place for place, token in enumerate(ids) if token == PLACEHOLDER]
    offsets = [(places[0], places[-1])] if places else []
    item = MultimodalDataItem(modality=Modality[modality], feature=feature, offsets=offsets)
    for name, value in data.items():
        item.set(name, value)
    return MultimodalInputs.from_processor_output(
        MultimodalProcessorOutput(mm_items=[item], input_ids=list(ids), **fields)
    )
