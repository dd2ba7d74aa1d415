"""Engines that share weights: alone, and as replicas of one name in a ``Pool``."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from references import reference
from sglang_distguard import (
    Engine,
    EngineClosed,
    EngineFailed,
    NotSupported,
    Pool,
    Replicas,
    SpecMismatch,
    StateInUse,
    snapshot,
)
from sglang_distguard.runner import weights
from sglang_distguard.testing import server_args
from sglang_distguard.testing.steps import PROMPTS
from test_engines import GREEDY, LONG, MANY, asked

Model = Callable[..., Path]


def arguments(model: Model, architecture: str = "llama", **settings: Any) -> dict[str, Any]:
    args = server_args(model(architecture), sleep_on_idle=True, **settings)
    return {"server_args": args, "start_timeout": MANY}


def alone(model: Model, architecture: str = "llama", seed: int = 0) -> list[list[int]]:
    return reference(model(architecture, seed)).tokens


@pytest.fixture
def pool(guard: None) -> Iterator[Pool]:
    with Pool() as made:
        yield made


@pytest.fixture
def chat(pool: Pool, model: Model) -> Replicas:
    """Two replicas of a small Llama in ``pool``."""
    made = pool.load("chat", replicas=2, **arguments(model))
    assert isinstance(made, Replicas)
    return made


def asks_long(engine: Any) -> Any:
    """A stream of many tokens that has begun."""
    stream = engine.generate(input_ids=list(PROMPTS[0]), sampling_params=LONG, stream=True)
    next(stream)
    return stream


def test_replicas_of_one_name_share_weights_and_requests(
    pool: Pool, chat: Replicas, model: Model
) -> None:
    expected = alone(model)
    one, two = chat.engines
    assert asked(one) == asked(two) == asked(pool["chat"]) == expected
    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(asked, pool["chat"]) for _ in range(12)]
        assert [it.result(MANY) for it in futures] == [expected] * 12

    async def ask() -> Any:
        prompts = [list(it) for it in PROMPTS]
        return await pool["chat"].async_generate(input_ids=prompts, sampling_params=GREEDY)

    assert [it["output_ids"] for it in asyncio.run(ask())] == expected

    (info,) = pool.list()
    assert (info.name, info.state, info.pending) == ("chat", "serving", 0)
    assert [it.name for it in info.replicas] == ["chat/1", "chat/2"]
    memories = [it.memory for it in info.replicas]
    assert [it and it.shared_with for it in memories] == [("chat/2",), ("chat/1",)]
    first, second = (it for it in memories if it is not None)
    assert first.shared == second.shared > 0
    together = pool.memory()
    assert together == info.memory == chat.memory()
    assert together.shared == first.shared  # once
    assert together.weights == first.weights + second.weights
    assert together.kv_cache == first.kv_cache + second.kv_cache

    # The one that is busy gets no further request; of two idle ones each gets its turn.
    busy = asks_long(one)
    assert {chat.serving() for _ in range(4)} == {two}
    other = asks_long(two)
    assert {chat.serving() for _ in range(4)} == {one, two}
    assert chat.pending == 2
    chat.abort(all=True)
    for stream in (busy, other):
        *_, last = stream
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert pool["chat"].flush_cache().success
    assert chat.get_model_info()["model_path"] == chat.model_path
    with pytest.raises(NotSupported, match=r"Replicas.open_session is not supported: .*\.engines"):
        chat.open_session(100)
    with pytest.raises(NotSupported, match="freeze_gc"):
        chat.freeze_gc()
    with pytest.raises(AttributeError):
        _ = chat.does_not_exist


def test_a_replica_that_fails_is_left_out_and_the_last_one_may_be_updated(
    pool: Pool, chat: Replicas, model: Model
) -> None:
    one, two = chat.engines
    with pytest.raises(StateInUse, match=r"would change weights that engine 'chat/.' shares"):
        chat.update_weights_from_disk(str(model("llama", seed=1)))

    def breaks(*_args: Any) -> None:
        raise ValueError("planted")

    one._begun[0].manager.run_batch = breaks
    with pytest.raises(EngineFailed, match="planted"):
        asked(one)
    for _ in range(3):
        assert asked(chat) == alone(model)
    (info,) = pool.list()
    assert (info.state, chat.failure) == ("serving", None)
    assert [it.state for it in info.replicas] == ["failed", "serving"]
    one.close()
    assert info.memory is not None
    assert two.memory().shared == 0
    assert two.update_weights_from_disk(str(model("llama", seed=1)))[0]
    assert asked(chat) == alone(model, seed=1)
    two._begun[0].manager.run_batch = breaks
    with pytest.raises(EngineFailed, match="planted"):
        asked(chat)
    assert isinstance(chat.failure, ValueError)
    assert [it.state for it in pool.list()] == ["failed"]


def test_replicas_are_closed_and_replaced_as_a_whole(
    pool: Pool, chat: Replicas, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pending = [asks_long(it) for it in chat.engines]
    one, two = chat.engines
    with ThreadPoolExecutor(1) as thread:
        ended = [thread.submit(list, it) for it in pending[:1]]
        made = pool.replace("chat", drain=MANY, replicas=2, **arguments(model, "gpt2"))
        assert [len(it.result(MANY)) for it in ended] != [0]
    assert pool["chat"] is made is not chat
    for engine in (one, two, chat):
        with pytest.raises(EngineClosed):
            asked(engine)
    assert asked(pool["chat"]) == alone(model, "gpt2")
    assert [it["key"] for it in snapshot()["slots"] if "weights" in it["key"]] != []
    with pytest.raises(ValueError, match="replicas must be at least 1"):
        pool.load("other", replicas=0, **arguments(model))
    pool.close("chat", drain=0)
    assert len(pool) == 0

    def fails(*_args: Any) -> None:
        raise MemoryError("planted")

    # A replica that does not start takes the others with it.
    monkeypatch.setattr(weights, "_take", fails)
    with pytest.raises(MemoryError, match="planted"):
        pool.load("other", replicas=2, **arguments(model))
    assert pool.list() == []
    assert [it["key"] for it in snapshot()["slots"] if "weights" in it["key"]] == []


def test_an_engine_detaches_before_its_weights_change_and_the_other_keeps_its_own(
    guard: None, model: Model
) -> None:
    from safetensors.torch import load_file

    new = model("llama", seed=1)
    with Engine(name="one", **arguments(model)) as one:
        with pytest.raises(SpecMismatch, match="the weights of runner 'one-scheduler' cannot"):
            Engine(name="other", share_weights_with=one, **arguments(model, "gpt2"))
        with pytest.raises(TypeError, match="share_weights_with must be an Engine"):
            Engine(share_weights_with=one.model_path, **arguments(model))  # type: ignore[arg-type]
        with Engine(name="two", share_weights_with=one, **arguments(model)) as two:
            for change, given in (
                ("update_weights_from_disk", (str(new),)),
                ("begin_weight_update", ()),
                ("end_weight_update", ()),
                ("update_weights_from_ipc", ({},)),
            ):
                for engine, other in ((one, "two"), (two, "one")):
                    with pytest.raises(StateInUse, match=rf"{change}\(\) .* shares with '{other}'"):
                        getattr(engine, change)(*given)
                    # Past this check, the scheduler refuses by itself, and goes on.
                    answer = getattr(engine._made, change)(*given)
                    assert answer[0] is False
                    assert "detach_weights" in answer[1]
            assert asked(one) == asked(two) == alone(model)
            assert two.detach_weights() is True
            assert two.detach_weights() is False
            assert two.memory().shared_with == one.memory().shared_with == ()
            assert two.begin_weight_update()[0]
            tensors = list(load_file(new / "model.safetensors").items())
            assert two.update_weights_from_tensor(tensors)[0]
            assert two.end_weight_update()[0]
            assert asked(two) == alone(model, seed=1)
            assert asked(one) == alone(model)
        with pytest.raises(EngineClosed):
            two.memory()
        assert one.update_weights_from_disk(str(new))[0]
        assert asked(one) == alone(model, seed=1)
