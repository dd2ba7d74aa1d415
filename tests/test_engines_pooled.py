"""Engines of embedding and cross-encoder models answer at once as `sgl.Engine` does alone."""

from __future__ import annotations

from typing import Any

import pytest
from engine_calls import alone, at_once, checkpoint, opened

SETTINGS: dict[str, Any] = {"is_embedding": True, "skip_tokenizer_init": False}


@pytest.mark.parametrize(
    ("subject", "kinds"),
    [
        ("pooled", ("llama_embedding", "qwen3_embedding")),
        ("reranked", ("bert_scores", "xlm_roberta_scores")),
    ],
)
def test_two_engines_answer_at_once_as_each_alone(
    guard: None, subject: str, kinds: tuple[str, str]
) -> None:
    folders = [checkpoint(kind, talks=True) for kind in kinds]
    expected = [alone(folder, {subject: {}}, **SETTINGS) for folder in folders]
    with opened(*folders, **SETTINGS) as engines:
        assert at_once(engines, [{subject: {}}] * 2) == expected
    assert expected[0] != expected[1]
