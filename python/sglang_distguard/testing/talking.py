"""Small models that take and give text: a chat model and an embedding model, for trying a server."""

from __future__ import annotations

import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

from sglang_distguard.testing.catalog import CATALOG
from sglang_distguard.testing.models import VOCABULARY, create_model

#: Name of a model -> its architecture in the catalog.
MODELS = {"chat": "llama", "embed": "llama_embedding"}
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_UNKNOWN, _END = "?", "<end>"


def create_talking_models(directory: str | Path) -> dict[str, Path]:
    """Write both checkpoints with tokenizers, and return name -> folder; keep existing ones.

    The weights are random, so the text is without sense. No network is used.

    Args:
        directory: the checkpoints are folders in it.
    """
    return {name: _create(name, Path(directory)) for name in MODELS}


def _create(name: str, directory: Path) -> Path:
    target = directory / f"tiny-{name}"
    if (target / "tokenizer.json").is_file():
        return target
    builders = {key: CATALOG[key].builder for key in MODELS.values()}
    weights = create_model(MODELS[name], directory, builders=builders)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=directory))
    try:
        shutil.copytree(weights, scratch, dirs_exist_ok=True)
        _tokenizer().save_pretrained(scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        os.rename(scratch, target)  # atomic; fails if another process was first
    except OSError:
        if not (target / "tokenizer.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _tokenizer() -> Any:
    """One token for each ASCII character; the other ids are words that only the model says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space, newline = "Ġ", "Ċ"  # as ByteLevel writes them
    letters = sorted({*string.digits, *string.ascii_letters, *string.punctuation})
    tokens = [*letters, space, newline]
    tokens += [f"{space}word{number}" for number in range(len(tokens), VOCABULARY - 1)]
    known = {token: number for number, token in enumerate([*tokens, _END])}
    made: Any = Tokenizer(models.BPE(vocab=known, merges=[], unk_token=_UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=_END, pad_token=_END)
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
