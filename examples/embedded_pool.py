"""An application of your own with a pool of engines in it.

    python examples/embedded_pool.py [CHAT-MODEL EMBEDDING-MODEL]

It answers `POST /nearest` with the sentence that is nearest to a question, by asking the embedding
model in this process, and has OpenAI's routes for both models below `/models`. Without arguments,
small models with random weights are made in .cache/.

    curl http://127.0.0.1:8000/nearest -d '{"question": "Where?", "sentences": ["Here.", "Then."]}' \
        -H 'Content-Type: application/json'
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import sglang_distguard
import torch
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel
from sglang_distguard.serving import application
from sglang_distguard.testing import prepare_environment, recipe
from sglang_distguard.testing.talking import create_talking_models

prepare_environment()  # without CUDA: SGLang's CPU engine, and its own stub of sgl_kernel
sglang_distguard.install()


def models(paths: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> arguments of `Pool.load`."""
    if paths:
        chat, embed = paths
        return {"chat": {"model_path": chat}, "embed": {"model_path": embed, "is_embedding": True}}
    small = {**recipe.settings(), "skip_tokenizer_init": False}
    made = create_talking_models(Path(".cache/models"))
    return {name: {"model_path": str(folder), **small} for name, folder in made.items()}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Both engines load at once, and are closed when the application ends."""
    async with sglang_distguard.Pool() as pool:
        wanted = models(sys.argv[1:])
        await asyncio.gather(*(pool.aload(name, **given) for name, given in wanted.items()))
        app.state.pool = pool
        app.mount("/models", application(pool))
        yield


app = FastAPI(lifespan=lifespan)


class Asked(BaseModel):
    """A question and the sentences that may be near to it."""

    question: str
    sentences: list[str]


@app.post("/nearest")
async def nearest(asked: Asked, request: Request) -> dict[str, Any]:
    """Your own route asks an engine as a function: there is no connection between them."""
    embed = request.app.state.pool["embed"]
    made = await embed.async_encode([asked.question, *asked.sentences])
    question, *sentences = torch.tensor([it["embedding"] for it in made])
    near = torch.stack(sentences) @ question
    return {"sentence": asked.sentences[int(near.argmax())], "nearness": near.max().item()}


if __name__ == "__main__":
    uvicorn.run(app, port=8000)
