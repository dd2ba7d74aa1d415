"""Every architecture that this package can make small random checkpoints of.

It is a superset of ``ARCHITECTURES``. `verify/architectures.py` runs all of them and writes
docs/ARCHITECTURES.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from sglang_distguard.testing.catalog import decoders, multimodal, special
from sglang_distguard.testing.catalog.families import TOKENS, Row
from sglang_distguard.testing.catalog.items import Maker, Prompt
from sglang_distguard.testing.models import ARCHITECTURES, Builder, create_model
from sglang_distguard.testing.steps import PROMPTS

#: The five of ``ARCHITECTURES``: kind and transformers class.
_DEFAULTS: Mapping[str, tuple[str, str]] = {
    "gpt2": ("dense", "GPT2LMHeadModel"),
    "opt": ("dense", "OPTForCausalLM"),
    "llama": ("dense", "LlamaForCausalLM"),
    "mixtral": ("MoE", "MixtralForCausalLM"),
    "qwen3_moe": ("MoE", "Qwen3MoeForCausalLM"),
}
_ROWS: tuple[Row, ...] = (
    *decoders.dense(),
    *decoders.moe(),
    *special.latent(),
    *special.hybrid(),
    *decoders.fallback(),
    *special.pooled(),
    *multimodal.rows(),
)


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: key of ``CATALOG``.
        kind: dense, MoE, MLA, hybrid, embedding, scores …; for display only.
        transformers: name of the transformers class that has the weights and is the reference.
        builder: returns that class, or a subclass, and a small configuration.
        served: name of SGLang's class, if it differs from ``transformers``.
        readout: what is compared: "logits", or a key of ``readouts.READOUTS``.
        overrides: ``ServerArgs`` fields that override the recipe's.
        beside: ``ServerArgs`` fields that other runners in the same process need too, because
            SGLang sets them for the whole process when it builds this architecture.
        items: puts an image or a sound into a prompt; None for a model that takes text only.
    """

    name: str
    kind: str
    transformers: str
    builder: Builder = field(repr=False)
    served: Optional[str] = None
    readout: str = "logits"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    items: Optional[Maker] = None

    def prompts(self) -> list[Prompt]:
        """``PROMPTS``, each with an item of its own where the model takes one."""
        make = self.items or (lambda ids, number: Prompt(tuple(ids)))
        return [make(ids, number) for number, ids in enumerate(PROMPTS)]


def _builder(row: Row) -> Builder:
    def build() -> tuple[Any, Any]:
        import transformers

        base = getattr(transformers, row.transformers)
        kind: Any = base if row.change is None else row.change(base)
        if row.served is not None and not row.fallback:
            # transformers writes the class's name into config.json, and SGLang reads it there.
            kind = type(row.served, (kind,), {})
        return kind, base.config_class(**{**TOKENS, **row.settings})

    return build


def _catalog() -> dict[str, Entry]:
    entries = {
        name: Entry(name, kind, cls, ARCHITECTURES[name]) for name, (kind, cls) in _DEFAULTS.items()
    }
    for row in _ROWS:
        if row.name in entries:
            raise ValueError(f"{row.name} is listed twice")
        entries[row.name] = Entry(
            row.name,
            row.kind,
            row.transformers,
            _builder(row),
            row.served,
            row.readout,
            row.overrides,
            row.beside,
            row.items,
        )
    return entries


#: Name -> architecture.
CATALOG: dict[str, Entry] = _catalog()


def create(name: str, directory: str | Path, *, seed: int = 0) -> Path:
    """Like ``create_model``, for every architecture of the catalog, with more random weights.

    transformers initialises biases with 0 and norms with 1, so that a model that ignores them
    computes the same, and one projection of images with 0. Here they are random too.

    Args:
        name: a key of ``CATALOG``.
        directory: folder of the checkpoints; not the one that ``create_model`` uses.
        seed: of the random weights.

    Raises:
        KeyError: unknown name.
    """
    builders = {key: entry.builder for key, entry in CATALOG.items()}
    return create_model(name, directory, seed=seed, builders=builders, adjust=_disturb)


def _disturb(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
