"""``Pool``: engines are opened, replaced and closed by name while others serve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from references import reference
from sglang_distguard import Pool, StateInUse, UnknownEngine, _core
from sglang_distguard.testing import server_args
from test_engines import MANY, asked

Model = Callable[..., Path]


def arguments(model: Model, architecture: str, dtype: str = "float32") -> dict[str, Any]:
    args = server_args(model(architecture), dtype=dtype, sleep_on_idle=True)
    return {"server_args": args, "start_timeout": MANY}


def alone(model: Model, architecture: str, dtype: str = "float32") -> list[list[int]]:
    return reference(model(architecture), dtype).tokens


@pytest.fixture
def pool(guard: None) -> Iterator[Pool]:
    with Pool() as made:
        yield made


def test_engines_are_loaded_and_closed_while_another_serves(pool: Pool, model: Model) -> None:
    pool.load("chat", memory=20_000_000, **arguments(model, "llama"))
    assert [(name, size >= 20_000_000) for name, size in _core.promised_memory("cpu")] == [
        ("chat-scheduler", True)
    ]
    expected = alone(model, "llama")

    async def change() -> None:
        await pool.aload("judge", **arguments(model, "qwen3_moe", "bfloat16"))
        assert asked(pool["judge"]) == alone(model, "qwen3_moe", "bfloat16")
        await pool.aclose("judge")

    with ThreadPoolExecutor(1) as thread:
        changed = thread.submit(asyncio.run, change())
        answers = [asked(pool["chat"])]
        while not changed.done():
            answers.append(asked(pool["chat"]))
        changed.result()
    assert all(answer == expected for answer in answers)
    assert [(it.name, it.state) for it in pool.list()] == [("chat", "serving")]


def test_replacing_keeps_the_old_engine_until_the_new_one_serves(pool: Pool, model: Model) -> None:
    old = pool.load("chat", **arguments(model, "llama"))
    with pytest.raises(Exception, match="nothing"):
        pool.replace("chat", model_path=str(model("llama") / "nothing"), device="cpu")
    assert asked(pool["chat"]) == alone(model, "llama")
    new = pool.replace("chat", **arguments(model, "gpt2"))
    assert pool["chat"] is new is not old
    assert asked(pool["chat"]) == alone(model, "gpt2")


def test_a_name_is_changed_by_one_thread_at_a_time(pool: Pool, model: Model) -> None:
    with pytest.raises(UnknownEngine, match="engine 'chat' is not in this pool; serving: none"):
        pool["chat"]
    with pytest.raises(UnknownEngine, match="engine 'chat' is not in this pool; known: none"):
        pool.close("chat")
    pool.load("chat", **arguments(model, "llama"))
    with pytest.raises(StateInUse, match=r"the name .chat. is taken by an engine of .*use replace"):
        pool.load("chat", **arguments(model, "llama"))
    with pool._change("chat", "closing", must_exist=True):
        with pytest.raises(StateInUse, match="'chat' is closing in another thread"):
            pool.close("chat")
        assert [it.state for it in pool.list()] == ["closing"]
