"""Engines in one process, step by step. Editors show the cells that `# %%` begins.

python examples/engines_walkthrough.py
"""

# %% Small models with random weights, made without a network; use your own paths instead.
from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sglang_distguard as dg
from sglang_distguard.testing import prepare_environment, recipe
from sglang_distguard.testing.talking import create_talking_models

prepare_environment()  # without CUDA: SGLang's CPU engine, and its own stub of sgl_kernel
dg.install()
folders = create_talking_models(Path(".cache/models"))
settings = {**recipe.settings(), "skip_tokenizer_init": False, "enable_metrics": True}

# %% Two engines, each in threads of this process. They load at once.
pool = dg.Pool()
with ThreadPoolExecutor() as threads:
    for name, folder in folders.items():
        threads.submit(pool.load, name, model_path=str(folder), **settings)
for info in pool.list():
    print(info.name, info.state, info.pending)

# %% The arguments and answers are those of SGLang's Engine. Any thread may ask.
greedy = {"temperature": 0, "max_new_tokens": 6}
print(pool["chat"].generate("Hello", greedy)["text"])
print(len(pool["embed"].encode("Hello")["embedding"]), "numbers")

# %% A stream gives the text so far.
for chunk in pool["chat"].generate("Hello", {**greedy, "max_new_tokens": 3}, stream=True):
    print(chunk["text"])


# %% Both models at once, from an asyncio loop.
async def ask() -> None:
    """Ask both engines."""
    said, embedded = await asyncio.gather(
        pool["chat"].async_generate("How are you?", greedy), pool["embed"].async_encode("How?")
    )
    print(said["meta_info"]["completion_tokens"], "tokens,", len(embedded["embedding"]), "numbers")


asyncio.run(ask())

# %% A model is replaced while it is asked: the old one serves until the new one does.
with ThreadPoolExecutor() as threads:
    replaced = threads.submit(
        pool.replace, "chat", model_path=str(folders["chat"]), **{**settings, "dtype": "bfloat16"}
    )
    answers = 0
    while not replaced.done():
        pool["chat"].generate("Hello", greedy)
        answers += 1
print("answered meanwhile:", answers > 0)

# %% What SGLang measures, by engine.
families = pool["embed"].metric_families(model="embed")
tokens = next(it for it in families if it.name == "sglang:prompt_tokens")
print(tokens.samples[0].labels["model"], int(tokens.samples[0].value), "tokens of prompts")

# %% Closing gives back threads, sockets and files.
pool.close_all()
print(pool.list())
dg.teardown()
