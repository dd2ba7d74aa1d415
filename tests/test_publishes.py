"""A publish beside those of other threads, at the worst moments: no configuration is lost or mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang_distguard as dg
from runner_calls import in_thread
from sglang_distguard import _core
from sglang_distguard.context import generation, scopes
from sglang_distguard.context.scopes import of_published, scopes_of_published
from sglang_distguard.testing import server_args

Model = Callable[..., Path]


def publish(args: Any) -> None:
    from sglang.srt.runtime_context import SpawnRanks
    from sglang.srt.runtime_context import publish as publish_of_sglang

    publish_of_sglang(args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))


def published() -> str:
    from sglang.srt.runtime_context import get_model

    return Path(get_model().model_path).name


def test_a_configuration_that_another_thread_publishes_meanwhile_is_kept(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published after this thread has looked whether there is one, and before it decides."""
    other, mine = server_args(model("llama")), server_args(model("gpt2"))
    found = type(generation.current()).published

    def looks(self: Any) -> Any:
        monkeypatch.undo()
        seen = found(self)
        in_thread(lambda: publish(other))
        return seen

    with _core.run_as(None):
        monkeypatch.setattr(type(generation.current()), "published", looks)
        in_thread(lambda: publish(mine))
        assert published() == "gpt2-0"
        assert len(scopes_of_published(other)) == len(scopes_of_published(mine)) == 1
        with of_published(other):
            assert published() == "llama-0"


def test_a_build_finds_a_configuration_that_is_put_aside_meanwhile(
    guard: None, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put aside after the build has found where it is, and before it goes there."""
    mine, other = server_args(model("llama")), server_args(model("gpt2"))
    found = scopes.scopes_of_published

    def looks(server_args: Any) -> Any:
        monkeypatch.undo()
        seen = found(server_args)
        in_thread(lambda: publish(other))
        return seen

    with _core.run_as(None):
        in_thread(lambda: publish(mine))
        monkeypatch.setattr(scopes, "scopes_of_published", looks)
        with of_published(mine):
            assert published() == "llama-0"
        assert published() == "gpt2-0"
        runner = dg.build_runner(server_args(model("opt")))
        dg.close(runner)


def test_a_publish_that_cannot_be_put_aside_stays_where_it_is(guard: None, model: Model) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with _core.run_as(None):
        in_thread(lambda: publish(server_args(model("llama"))))
        assert published() == "llama-0"
        _core.call_before_scopes(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                publish(server_args(model("gpt2")))
        finally:
            _core.call_before_scopes(None)
        assert published() == "llama-0"
        in_thread(lambda: publish(server_args(model("opt"))))
        assert published() == "opt-0"
