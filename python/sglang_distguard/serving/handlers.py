"""Which of SGLang's serving classes answers which route (0.5.23 `http_server.lifespan`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from sglang.srt.entrypoints.openai import protocol
from sglang.srt.entrypoints.openai.serving_classify import OpenAIServingClassify
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_embedding import OpenAIServingEmbedding
from sglang.srt.entrypoints.openai.serving_rerank import OpenAIServingRerank
from sglang.srt.entrypoints.openai.serving_score import OpenAIServingScore
from sglang.srt.entrypoints.openai.serving_tokenize import (
    OpenAIServingDetokenize,
    OpenAIServingTokenize,
)


@dataclass(frozen=True)
class Kind:
    """One kind of request.

    Attributes:
        path: of the route.
        body: of the request; it has a field ``model``.
        handler: makes SGLang's object from its Engine, in the engine's scope.
    """

    path: str
    body: type[BaseModel]
    handler: Callable[[Any], Any]


class RerankRequest(protocol.V1RerankReqInput):
    """SGLang's, and the model, which it has no field for (0.5.23)."""

    model: str = protocol.DEFAULT_MODEL_NAME


def _with_templates(kind: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    return lambda made: kind(made.tokenizer_manager, made.template_manager)


def _chat(made: Any) -> Any:
    return made.tokenizer_manager.serving_chat_class(made.tokenizer_manager, made.template_manager)


KINDS = (
    Kind("/v1/chat/completions", protocol.ChatCompletionRequest, _chat),
    Kind("/v1/completions", protocol.CompletionRequest, _with_templates(OpenAIServingCompletion)),
    Kind("/v1/embeddings", protocol.EmbeddingRequest, _with_templates(OpenAIServingEmbedding)),
    Kind("/v1/classify", protocol.ClassifyRequest, _with_templates(OpenAIServingClassify)),
    Kind("/v1/rerank", RerankRequest, _with_templates(OpenAIServingRerank)),
    Kind(
        "/v1/score",
        protocol.ScoringRequest,
        lambda made: OpenAIServingScore(made.tokenizer_manager),
    ),
    Kind("/v1/tokenize", protocol.TokenizeRequest, _with_templates(OpenAIServingTokenize)),
    Kind(
        "/v1/detokenize",
        protocol.DetokenizeRequest,
        lambda made: OpenAIServingDetokenize(made.tokenizer_manager),
    ),
)
